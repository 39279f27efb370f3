"""Hunyuan-A13B (`HunYuanMoEV1ForCausalLM`): q/k norm after the rotation, softmax gate renormalised over the top k, a
shared expert, every layer sparse."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames(
    gate="gate.wg.weight",
    shared="mlp.shared_mlp",
    query_norm="self_attn.query_layernorm.weight",
    key_norm="self_attn.key_layernorm.weight",
)


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `HunYuanMoEV1Config`."""
    hf = HFConfig(config, "hunyuan_v1_moe")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(use_qk_norm=True, use_mixed_mlp_moe=True, norm_topk_prob=True)
    sizes = read_sizes(hf, vocab_size=290943, hidden_size=4096, num_layers=32, num_heads=32, max_position=2048)
    bias = hf.flag("attention_bias", False)
    attention = grouped_attention(hf, sizes, num_kv_heads=None, qkv_bias=bias, output_bias=bias, qk_norm="rotated_head")
    hf.always(attention_head_dim=attention.head_dim)
    intermediate_size = hf.integer("intermediate_size", default=11008)
    for name, value in (("moe_intermediate_size", intermediate_size), ("num_shared_expert", 1)):
        hf.require(name, (value, [value] * sizes.num_layers), value)
    moe = MoEConfig(
        num_experts=hf.integer_of_layers("num_local_experts", "num_experts", num_layers=sizes.num_layers, default=1),
        top_k=hf.integer_of_layers("num_experts_per_tok", "moe_topk", num_layers=sizes.num_layers, default=1),
        intermediate_size=intermediate_size,
        shared_intermediate_size=intermediate_size,
        gate_float32=True,
    )
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=10_000.0, ntk_alpha=True),
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers, intermediate_size),
        rms_norm_eps=1e-5,
    )
