"""MiniMax-M2 (`MiniMaxM2ForCausalLM`): q/k norm over all heads of a token, partial rotary, sigmoid gate with correction
bias, every layer sparse. Layers for multi-token prediction are not read."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import SwiGLUNames, TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames(
    sparse="block_sparse_moe",
    correction_bias="e_score_correction_bias",
    expert_parts=SwiGLUNames(gate="w1", up="w3", down="w2"),
)


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `MiniMaxM2Config`."""
    hf = HFConfig(config, "minimax_m2")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(use_qk_norm=True, qk_norm_type="per_layer", use_routing_bias=True, scoring_func="sigmoid")
    hf.always(shared_intermediate_size=0)
    sizes = read_sizes(
        hf,
        vocab_size=200064,
        hidden_size=3072,
        num_layers=62,
        num_heads=48,
        max_position=196608,
    )
    hf.always(attn_type_list=[1] * sizes.num_layers)  # 1: full attention
    attention = grouped_attention(hf, sizes, num_kv_heads=8, head_dim=128, qk_norm="token")
    rotary_dim = hf.integer("rotary_dim", default=attention.head_dim)
    moe = MoEConfig(
        num_experts=hf.integer("num_experts", "num_local_experts", default=256),
        top_k=hf.integer("num_experts_per_tok", default=8),
        intermediate_size=hf.integer("intermediate_size", default=1536),
        scoring="sigmoid",
        correction_bias=True,
        gate_float32=True,
    )
    rope = read_rope(
        hf, attention.head_dim, sizes.max_position, theta=5_000_000.0, rotary_factor=rotary_dim / attention.head_dim
    )
    return model_config(
        hf,
        sizes,
        rope=rope,
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers, moe.intermediate_size),
        rms_norm_eps=1e-6,
    )
