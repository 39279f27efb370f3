"""Reading `config.json`: every key is read, known to have no effect here, or refused by name. No torch."""

from __future__ import annotations

from typing import Any, Literal, cast

from moe_runtime.config.model import RopeConfig

# Keys that do not change what the model computes when it generates text.
HARMLESS = frozenset(
    """
    architectures model_type auto_map transformers_version _name_or_path name_or_path torch_dtype dtype use_cache
    initializer_range attention_dropout output_router_logits router_aux_loss_coef router_jitter_noise return_dict
    output_attentions output_hidden_states bos_token_id eos_token_id pad_token_id id2label label2id problem_type
    chunk_size_feed_forward is_encoder_decoder is_decoder tokenizer_class _attn_implementation attn_implementation
    _experts_implementation experts_implementation pretraining_tp torchscript use_bfloat16 max_window_layers
    use_sliding_window num_nextn_predict_layers num_mtp_layers keys_to_ignore_at_inference
    """.split()  # noqa: SIM905
)
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


class HFConfig:
    """One `config.json`, read key by key, so that unread keys can be refused.

    Raises ValueError with one line that names the key, its value and what is allowed.
    """

    def __init__(self, values: dict[str, Any], family: str) -> None:
        self.values = values
        self.family = family
        self.seen: set[str] = set()

    def get(self, *names: str, default: Any = None) -> Any:
        """Value of the first of several spellings that is present and not null."""
        self.seen.update(names)
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        return default

    def integer(self, *names: str, default: int | None = None, low: int = 1) -> int:
        """An integer of at least `low`; without a default the key is required."""
        value = self.get(*names, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{names[0]}: {value!r} in config.json is not allowed; it must be an integer >= {low}")
        return value

    def number(self, *names: str, default: float) -> float:
        value = self.get(*names, default=default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{names[0]}: {value!r} in config.json is not allowed; it must be a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {value!r} in config.json is not allowed; it must be true or false")
        return value

    def require(self, name: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """A key of which only some values are supported."""
        value = self.get(name, default=default)
        if value not in allowed:
            raise ValueError(f"{name}: {value!r} in config.json is not supported; supported: {list(allowed)}")
        return value

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        if self.get("head_dim") is None and hidden_size % num_heads:
            raise ValueError(f"head_dim: missing in config.json, and {num_heads} heads do not divide {hidden_size}")
        return self.integer("head_dim", default=hidden_size // num_heads)

    def rope(self, head_dim: int, max_position: int, *, theta: float, rotary_factor: float = 1.0) -> RopeConfig:
        """Rotary parameters from `rope_parameters` (new) or `rope_scaling` + `rope_theta` (old)."""
        scaling = dict(self.get("rope_parameters", "rope_scaling", default={}))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_KEYS:
            raise ValueError(f"rope_type: {kind!r} in config.json is not supported; supported: {list(ROPE_KEYS)}")
        for key in scaling:
            if key not in ROPE_KEYS[kind] | ROPE_KEYS["default"]:
                raise ValueError(f"{key}: not supported in config.json's rope parameters of type {kind!r}")
        if kind in ("linear", "dynamic", "llama3") and "factor" not in scaling:
            raise ValueError(f"factor: missing in config.json's rope parameters of type {kind!r}")
        original = scaling.get("original_max_position_embeddings") or self.get("original_max_position_embeddings")
        original = original or max_position
        theta = scaling.get("rope_theta") or self.number("rope_theta", default=theta)
        partial = scaling.get("partial_rotary_factor")
        if partial is None:
            partial = self.number("partial_rotary_factor", default=rotary_factor)
        self.get("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        rotary_dim = int(head_dim * partial)
        if rotary_dim % 2 or rotary_dim < 2:
            raise ValueError(f"partial_rotary_factor: {partial} in config.json rotates {rotary_dim} of {head_dim} dims")
        defaults = RopeConfig(theta=float(theta), rotary_dim=rotary_dim)
        return RopeConfig(
            theta=float(theta),
            rotary_dim=rotary_dim,
            kind=cast(Literal["default", "linear", "dynamic", "llama3", "yarn"], kind),
            factor=float(scaling.get("factor") or max_position / original),
            original_max_position=max_position if kind == "dynamic" else int(original),
            low_freq_factor=float(scaling.get("low_freq_factor") or defaults.low_freq_factor),
            high_freq_factor=float(scaling.get("high_freq_factor") or defaults.high_freq_factor),
            beta_fast=float(scaling.get("beta_fast") or defaults.beta_fast),
            beta_slow=float(scaling.get("beta_slow") or defaults.beta_slow),
            attention_factor=scaling.get("attention_factor"),
            mscale=scaling.get("mscale"),
            mscale_all_dim=scaling.get("mscale_all_dim"),
            truncate=scaling.get("truncate", True),
        )

    def finish(self) -> None:
        """Refuse keys that were not read and may have an effect."""
        for name, value in self.values.items():
            if name not in self.seen and name not in HARMLESS and value not in (None, False, [], {}):
                raise ValueError(f"{name}: {value!r} in config.json is not supported for {self.family}")

    @property
    def dtype(self) -> str:
        """The checkpoint's dtype as the configuration states it."""
        return str(self.get("dtype", "torch_dtype", default="float32")).removeprefix("torch.")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        value = self.values.get("eos_token_id")
        if value is None:
            return ()
        return tuple(value) if isinstance(value, list) else (int(value),)
