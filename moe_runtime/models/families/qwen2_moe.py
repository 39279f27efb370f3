"""Qwen1.5-MoE and Qwen2-MoE (`Qwen2MoeForCausalLM`): biases in the QKV projections, softmax gate, a shared expert
that each token weighs, dense layers among sparse ones, some layers with a window."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate.weight")


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `Qwen2MoeConfig`."""
    hf = HFConfig(config, "qwen2_moe")
    hf.require("hidden_act", ("silu",), "silu")
    sizes = read_sizes(hf, vocab_size=151936, hidden_size=2048, num_layers=24, num_heads=16, max_position=32768)
    uses_window = hf.flag("use_sliding_window", False)
    window = hf.window(default=4096, is_used=uses_window)
    end = hf.integer("max_window_layers", default=28, low=0)
    windows = hf.layer_windows([uses_window and i % 2 == 0 and i < end for i in sizes.all_layers], window)
    attention = grouped_attention(hf, sizes, num_kv_heads=16, qkv_bias=hf.flag("qkv_bias", True))
    moe = MoEConfig(
        num_experts=hf.integer("num_experts", default=60),
        top_k=hf.integer("num_experts_per_tok", default=4),
        intermediate_size=hf.integer("moe_intermediate_size", default=1408),
        shared_intermediate_size=hf.integer("shared_expert_intermediate_size", default=5632),
        shared_gate=True,
        normalize_topk=hf.flag("norm_topk_prob", False),
    )
    sparse, dense_size = hf.sparse_layers(sizes.num_layers), hf.integer("intermediate_size", default=5632)
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=10_000.0),
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sparse, dense_size, windows),
        rms_norm_eps=1e-6,
    )
