"""The part of a `config.json` that all families read alike. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_runtime.config.attention import AttentionConfig, LatentAttentionConfig, QKNorm
from moe_runtime.config.model import LayerConfig, ModelConfig, MoEConfig, RopeConfig, yarn_magnitude
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.rope import NO_PARAMETERS, read_rope

MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_position: int

    @property
    def all_layers(self) -> range:
        """Index of every layer."""
        return range(self.num_layers)


def read_sizes(
    hf: HFConfig, *, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_position: int
) -> Sizes:
    """The sizes that a configuration gives; the arguments are the defaults of the family's class in transformers."""
    return Sizes(
        vocab_size=hf.integer("vocab_size", default=vocab_size),
        hidden_size=hf.integer("hidden_size", default=hidden_size),
        num_layers=hf.integer("num_hidden_layers", default=num_layers, high=MOST_LAYERS),
        num_heads=hf.integer("num_attention_heads", default=num_heads),
        max_position=hf.integer("max_position_embeddings", default=max_position),
    )


def grouped_attention(
    hf: HFConfig,
    sizes: Sizes,
    *,
    num_kv_heads: int | None,
    head_dim: int | None = None,
    sliding_window: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: QKNorm | None = None,
    scale: float | None = None,
    sinks: bool = False,
) -> AttentionConfig:
    """Grouped-query attention.

    Args:
        num_kv_heads: default of the family; None: as many as heads.
        head_dim: default of the family; None: the hidden size, divided among the heads.
    """
    if num_kv_heads is not None or hf.get("num_key_value_heads") is not None:
        num_kv_heads = hf.integer("num_key_value_heads", default=num_kv_heads)
    if head_dim is None:
        head_dim = hf.head_dim(sizes.hidden_size, sizes.num_heads)
    else:
        head_dim = hf.integer("head_dim", default=head_dim)
    return AttentionConfig(
        num_heads=sizes.num_heads,
        num_kv_heads=num_kv_heads or sizes.num_heads,
        head_dim=head_dim,
        sliding_window=sliding_window,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
        scale=scale,
        sinks=sinks,
    )


def read_groups(hf: HFConfig, default: tuple[int, int]) -> tuple[int, int]:
    """Groups of experts, and how many are kept; null means one."""
    num_groups, topk_groups = (
        hf.integer_or_null(name, default=count, null=1)
        for name, count in zip(("n_group", "topk_group"), default, strict=True)
    )
    return num_groups, topk_groups


def read_latent_attention(
    hf: HFConfig,
    *,
    num_heads: int,
    query_rank: int | None,
    latent_size: int,
    nope_size: int,
    rope_size: int,
    value_size: int,
    max_position: int,
    theta: float = 10_000.0,
    interleaved: bool = True,
    rotary_share: bool = False,
    absent_rope: Mapping[str, Any] = NO_PARAMETERS,
) -> tuple[LatentAttentionConfig, RopeConfig]:
    """Latent attention and its rotation, as DeepSeek-V2, V3 and their relatives spell it.

    The sizes are the defaults of the family's class in transformers.

    Args:
        num_heads, max_position: as read.
        rotary_share: `partial_rotary_factor` is the rotated share of a whole head, not of its rotated part.
        absent_rope: `absent` of `read_rope`.
    """
    nope_size = hf.integer("qk_nope_head_dim", default=nope_size)
    rope_size = hf.integer("qk_rope_head_dim", default=rope_size)
    size = nope_size + rope_size
    hf.require("num_key_value_heads", (num_heads,), num_heads)
    hf.require("head_dim", (size,) if rotary_share else (rope_size, size), size)
    hf.always(qk_head_dim=size)
    if rotary_share:
        rope = read_rope(
            hf,
            size,
            max_position,
            theta=theta,
            rotary_factor=rope_size / size,
            interleaved=interleaved,
            query_scale=True,
            absent=absent_rope,
        )
        if rope.rotary_dim != rope_size:
            raise ValueError(
                f"partial_rotary_factor: rotates {rope.rotary_dim} dims, "
                f"but qk_rope_head_dim is {rope_size} in config.json"
            )
    else:
        rope = read_rope(hf, rope_size, max_position, theta=theta, interleaved=interleaved, absent=absent_rope)
    scale = size**-0.5
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= yarn_magnitude(rope.factor, rope.mscale_all_dim) ** 2
    attention = LatentAttentionConfig(
        num_heads=num_heads,
        query_rank=hf.integer_or_null("q_lora_rank", default=query_rank, null=None),
        latent_size=hf.integer("kv_lora_rank", default=latent_size),
        nope_size=nope_size,
        rope_size=rope_size,
        head_value_size=hf.integer("v_head_dim", default=value_size),
        scale=scale,
        norm_eps=1e-6,
        bias=hf.flag("attention_bias", False),
    )
    return attention, rope


def correction_gate(
    hf: HFConfig,
    *,
    intermediate_size: int,
    num_experts: int | None = None,
    top_k: int | None = None,
    num_shared: int | None = None,
    normalize: bool = True,
    scaling: float = 1.0,
    groups: tuple[int, int] = (1, 1),
) -> MoEConfig:
    """The sparse block of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) and of families that took it over: a sigmoid
    gate with a correction bias and groups, and shared experts.

    The arguments are the defaults of the family's class in transformers; None: the key is required. `groups` are how
    many there are and how many are kept; null in a configuration means one.
    """
    hf.always(scoring_func="sigmoid", topk_method="noaux_tc")
    intermediate_size = hf.integer("moe_intermediate_size", default=intermediate_size)
    num_groups, topk_groups = read_groups(hf, groups)
    return MoEConfig(
        num_experts=hf.integer("num_local_experts", "n_routed_experts", "num_experts", default=num_experts),
        top_k=hf.integer("num_experts_per_tok", default=top_k),
        intermediate_size=intermediate_size,
        shared_intermediate_size=intermediate_size * hf.integer("n_shared_experts", default=num_shared),
        scoring="sigmoid",
        normalize_topk=hf.flag("norm_topk_prob", normalize),
        routed_scaling_factor=hf.positive("routed_scaling_factor", scaling),
        num_groups=num_groups,
        topk_groups=topk_groups,
        correction_bias=True,
        gate_float32=True,
    )


def model_config(
    hf: HFConfig,
    sizes: Sizes,
    *,
    rope: RopeConfig,
    moe: MoEConfig,
    layers: tuple[LayerConfig, ...],
    rms_norm_eps: float,
    tied: bool = False,
    embedding_multiplier: float = 1.0,
    residual_multiplier: float = 1.0,
    logits_scaling: float = 1.0,
) -> ModelConfig:
    """The whole configuration; refuses keys that nobody read.

    Args:
        rms_norm_eps, tied: defaults of the family's class in transformers.
    """
    if "layer_types" not in hf.seen:
        hf.layer_types(sizes.num_layers, layers[0].attention.sliding_window)
    model = ModelConfig(
        family=hf.family,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        rms_norm_eps=hf.positive("rms_norm_eps", rms_norm_eps),
        max_position_embeddings=sizes.max_position,
        rope=rope,
        moe=moe,
        layers=layers,
        tie_word_embeddings=hf.flag("tie_word_embeddings", tied),
        dtype=hf.dtype,
        eos_token_ids=hf.eos_token_ids,
        embedding_multiplier=embedding_multiplier,
        residual_multiplier=residual_multiplier,
        logits_scaling=logits_scaling,
    )
    hf.finish()
    return model
