"""Solar Open (`SolarOpenForCausalLM`): sigmoid gate with correction bias and groups, shared experts, every layer
sparse."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, layers_alike
from moe_runtime.models.decoder_config import correction_gate, grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames()


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `SolarOpenConfig`."""
    hf = HFConfig(config, "solar_open")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(use_qk_norm=False, first_k_dense_replace=0, moe_layer_freq=1)
    sizes = read_sizes(
        hf,
        vocab_size=196608,
        hidden_size=4096,
        num_layers=48,
        num_heads=64,
        max_position=131072,
    )
    attention = grouped_attention(hf, sizes, num_kv_heads=8, head_dim=128, qkv_bias=hf.flag("attention_bias", False))
    moe = correction_gate(hf, num_experts=128, top_k=8, intermediate_size=1280, num_shared=1)
    hf.integer("intermediate_size", default=1)  # of dense layers, which there are none of
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=1_000_000.0),
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers, moe.intermediate_size),
        rms_norm_eps=1e-5,
    )
