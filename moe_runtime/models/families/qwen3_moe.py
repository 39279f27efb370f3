"""Qwen3-MoE (`Qwen3MoeForCausalLM`): q/k norm, softmax gate, dense layers among sparse ones, no shared experts."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames()


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `Qwen3MoeConfig`."""
    hf = HFConfig(config, "qwen3_moe")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(use_qk_norm=True, scoring_func="softmax", n_group=1, topk_group=1, routed_scaling_factor=1.0)
    sizes = read_sizes(hf, vocab_size=151936, hidden_size=2048, num_layers=24, num_heads=32, max_position=32768)
    window = hf.window(default=4096, is_used=hf.flag("use_sliding_window", False))
    bias = hf.flag("attention_bias", False)
    attention = grouped_attention(
        hf, sizes, num_kv_heads=4, sliding_window=window, qkv_bias=bias, output_bias=bias, qk_norm="head"
    )
    moe = MoEConfig(
        num_experts=hf.integer("num_local_experts", "num_experts", default=128),
        top_k=hf.integer("num_experts_per_tok", default=8),
        intermediate_size=hf.integer("moe_intermediate_size", default=768),
        normalize_topk=hf.flag("norm_topk_prob", False),
    )
    dense_size = hf.integer("intermediate_size", default=6144)
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=10_000.0),
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, hf.sparse_layers(sizes.num_layers), dense_size),
        rms_norm_eps=1e-6,
    )
