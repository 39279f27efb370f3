"""Granite 3 MoE (`GraniteMoeForCausalLM`): multipliers of embedding, attention, residual rows and logits, softmax gate
renormalised over the top k, every layer sparse."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import SwiGLUNames, TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames(
    sparse="block_sparse_moe",
    gate="router.layer.weight",
    shared="shared_mlp",
    shared_parts=SwiGLUNames(gate_up="input_linear", down="output_linear"),
    fused_gate_up="block_sparse_moe.input_linear.weight",
    fused_down="block_sparse_moe.output_linear.weight",
)


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `GraniteMoeConfig`."""
    return parse_granite(HFConfig(config, "granitemoe"), shared_intermediate_size=0)


def parse_granite(hf: HFConfig, shared_intermediate_size: int) -> ModelConfig:
    """The configuration of a Granite MoE model whose layers are all attention."""
    hf.require("hidden_act", ("silu",), "silu")
    sizes = read_sizes(hf, vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, max_position=2048)
    bias = hf.flag("attention_bias", False)
    attention = grouped_attention(
        hf, sizes, num_kv_heads=None, qkv_bias=bias, output_bias=bias, scale=hf.positive("attention_multiplier", 1.0)
    )
    moe = MoEConfig(
        num_experts=hf.integer("num_local_experts", default=8),
        top_k=hf.integer("num_experts_per_tok", default=2),
        intermediate_size=hf.integer("intermediate_size", default=11008),
        shared_intermediate_size=shared_intermediate_size,
    )
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=10_000.0),
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers, moe.intermediate_size),
        rms_norm_eps=1e-6,
        embedding_multiplier=hf.positive("embedding_multiplier", 1.0),
        residual_multiplier=hf.positive("residual_multiplier", 1.0),
        logits_scaling=hf.positive("logits_scaling", 1.0),
    )
