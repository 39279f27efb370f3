"""ERNIE 4.5 (`Ernie4_5_MoeForCausalLM`): interleaved rotary, softmax gate with correction bias, shared experts, the
first layers dense. Layers for multi-token prediction are not read."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames(correction_bias="moe_statics.e_score_correction_bias", correction_bias_is_row=True)


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `Ernie4_5_MoeConfig`."""
    hf = HFConfig(config, "ernie4_5_moe")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(use_bias=False, moe_use_aux_free=True, moe_gate="topk", moe_norm_min=1e-12)
    sizes = read_sizes(hf, vocab_size=103424, hidden_size=2560, num_layers=28, num_heads=20, max_position=131072)
    attention = grouped_attention(hf, sizes, num_kv_heads=4)
    intermediate_size = hf.integer("moe_intermediate_size", default=1536)
    moe = MoEConfig(
        num_experts=hf.integer("num_experts", "moe_num_experts", default=64),
        top_k=hf.integer("num_experts_per_tok", "moe_k", default=6),
        intermediate_size=intermediate_size,
        shared_intermediate_size=intermediate_size * hf.integer("moe_num_shared_experts", default=2, low=0),
        correction_bias=True,
        gate_float32=True,
    )
    first = hf.integer("moe_layer_start_index", default=1, low=0)
    last = hf.integer("moe_layer_end_index", default=-1, low=-1)
    stride = hf.integer("moe_layer_interval", default=1)
    end = sizes.num_layers if last == -1 else min(last + 1, sizes.num_layers)
    dense_size = hf.integer("intermediate_size", default=12288)
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=500_000.0, interleaved=True),
        moe=moe,
        layers=layers_alike(
            sizes.num_layers, attention, [i for i in range(first, end) if (i + 1) % stride == 0], dense_size
        ),
        rms_norm_eps=1e-5,
        tied=True,
    )
