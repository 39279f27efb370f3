"""GLM-4.5 and relatives (`Glm4MoeForCausalLM`): sigmoid gate with correction bias and groups, shared experts,
partial rotary, the first layers dense. Layers for multi-token prediction are not read."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, layers_alike
from moe_runtime.models.decoder_config import correction_gate, grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames()


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `Glm4MoeConfig`."""
    hf = HFConfig(config, "glm4_moe")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(decoder_sparse_step=1, moe_layer_freq=1)
    sizes = read_sizes(hf, vocab_size=151552, hidden_size=4096, num_layers=46, num_heads=96, max_position=131072)
    attention = grouped_attention(
        hf,
        sizes,
        num_kv_heads=8,
        qkv_bias=hf.flag("attention_bias", False),
        qk_norm="head" if hf.flag("use_qk_norm", False) else None,
    )
    first_sparse = hf.integer("first_k_dense_replace", default=1, low=0)
    dense_size = hf.integer("intermediate_size", default=10944)
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=10_000.0, rotary_factor=0.5),
        moe=correction_gate(hf, num_experts=128, top_k=8, intermediate_size=1408, num_shared=1),
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers[first_sparse:], dense_size),
        rms_norm_eps=1e-5,
    )
