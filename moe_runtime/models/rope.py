"""Rotary parameters of a `config.json`. No torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, cast

from moe_runtime.config.model import RopeConfig
from moe_runtime.models.hf_config import HFConfig, shown
from moe_runtime.models.inert_keys import is_empty

logger = logging.getLogger(__name__)

ROPE_KEYS = {
    "default": frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"}),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
# Of the type "dynamic" with `alpha`; all but that one have no effect.
NTK_ALPHA_KEYS = frozenset({"alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"})

NO_PARAMETERS: Mapping[str, Any] = {}
QUERY_SCALE_KEYS = frozenset({"llama_4_scaling_beta", "max_position_embeddings"})


def read_rope(
    hf: HFConfig,
    head_dim: int,
    max_position: int,
    *,
    theta: float,
    rotary_factor: float | None = None,
    interleaved: bool = False,
    ntk_alpha: bool = False,
    query_scale: bool = False,
    absent: Mapping[str, Any] = NO_PARAMETERS,
) -> RopeConfig:
    """Rotary parameters from `rope_scaling` + `rope_theta` (old) or `rope_parameters` (new).

    Where several spellings are present, the one that transformers takes counts.

    Args:
        theta: default of the family.
        rotary_factor: default of the rotated share of a head; None: the family rotates whole heads.
        interleaved: see `RopeConfig`.
        ntk_alpha: with `alpha`, the type "dynamic" stretches the base once, whatever the length.
        query_scale: `llama_4_scaling_beta` may be given; see `RopeConfig`.
        absent: what transformers' class has where a configuration has no rope parameters.
    """
    scaling = _rope_values(hf, absent)
    kind = scaling.get("rope_type", "type", default="default")
    if kind not in list(ROPE_KEYS):
        raise ValueError(f"rope_type: {shown(kind)} in config.json is not supported; supported: {list(ROPE_KEYS)}")
    alpha = scaling.positive_or_none("alpha") if ntk_alpha and kind == "dynamic" else None
    known = ROPE_KEYS["default"] | (ROPE_KEYS[kind] if alpha is None else NTK_ALPHA_KEYS)
    if query_scale:
        known |= QUERY_SCALE_KEYS
    for key, value in scaling.values.items():
        if key not in known and not is_empty(value):
            raise ValueError(f"{key}: not supported in config.json's rope parameters of type {kind!r}")
    factor = scaling.positive_or_none("factor")
    if kind in ("linear", "dynamic", "llama3") and factor is None and alpha is None:
        raise ValueError(f"factor: missing in config.json's rope parameters of type {kind!r}")
    own, inner = (values.positive_or_none("original_max_position_embeddings") for values in (hf, scaling))
    original = own or inner or max_position
    own, inner = (values.positive_or_none("rope_theta") for values in (hf, scaling))
    theta = inner or own or theta
    rotary_dim = _rotary_dim(hf, scaling, head_dim, rotary_factor)
    if alpha is not None:
        if head_dim <= 2:
            raise scaling.refusal("alpha", alpha, "absent where a head has 2 dims")
        theta *= alpha ** (head_dim / (head_dim - 2))
        kind = "default"
    defaults = RopeConfig(theta=theta, rotary_dim=rotary_dim, interleaved=interleaved)
    if kind == "default":
        return defaults
    if kind == "yarn" and theta <= 1:
        raise scaling.refusal("rope_theta", theta, "above 1 for the type 'yarn'")
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        kind=cast(Literal["default", "linear", "dynamic", "llama3", "yarn"], kind),
        factor=factor or max_position / original,
        original_max_position=max_position if kind == "dynamic" else max(1, int(original)),
        low_freq_factor=scaling.positive_or_none("low_freq_factor") or defaults.low_freq_factor,
        high_freq_factor=scaling.positive_or_none("high_freq_factor") or defaults.high_freq_factor,
        beta_fast=scaling.positive_or_none("beta_fast") or defaults.beta_fast,
        beta_slow=scaling.positive_or_none("beta_slow") or defaults.beta_slow,
        attention_factor=scaling.number_or_none("attention_factor"),
        mscale=scaling.number_or_none("mscale"),
        mscale_all_dim=scaling.number_or_none("mscale_all_dim"),
        truncate=scaling.flag("truncate", True),
        interleaved=interleaved,
        query_scale=(beta, int(original)) if (beta := scaling.number_or_none("llama_4_scaling_beta")) else None,
    )


def _rotary_dim(hf: HFConfig, scaling: HFConfig, head_dim: int, factor: float | None) -> int:
    """Rotated dims of a head; `factor` is the default share, None if the family rotates whole heads."""
    inner, own = (values.number_or_none("partial_rotary_factor") for values in (scaling, hf))
    partial = next((value for value in (inner, own, factor) if value is not None), 1.0)
    if factor is None and partial != 1.0:
        raise hf.refusal("partial_rotary_factor", partial, f"1 or absent: {hf.family} rotates whole heads")
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise ValueError(f"partial_rotary_factor: {partial} in config.json rotates {rotary_dim} of {head_dim} dims")
    return rotary_dim


def _rope_values(hf: HFConfig, absent: Mapping[str, Any]) -> HFConfig:
    """The rope parameters. A `rope_scaling` that is not empty replaces `rope_parameters`, as in transformers."""
    old, new = (hf.get(name) for name in ("rope_scaling", "rope_parameters"))
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise hf.refusal(name, value, "an object")
    if old and new and old != new:
        logger.warning("config.json has rope_scaling and rope_parameters: rope_scaling counts, as in transformers")
    return HFConfig(old or dict(absent if new is None else new), hf.family, "config.json's rope parameters")
