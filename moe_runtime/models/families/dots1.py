"""dots.llm1 (`Dots1ForCausalLM`): q/k norm, sigmoid gate with correction bias and groups, shared experts, the first
layers dense, the last ones perhaps with a window."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, layers_alike
from moe_runtime.models.decoder_config import correction_gate, grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames()


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `Dots1Config`."""
    hf = HFConfig(config, "dots1")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(moe_layer_freq=1)
    sizes = read_sizes(hf, vocab_size=152064, hidden_size=4608, num_layers=62, num_heads=32, max_position=2048)
    window = hf.window(default=4096)
    first = hf.integer("max_window_layers", default=62, low=0)
    windows = hf.layer_windows([window is not None and index >= first for index in sizes.all_layers], window)
    bias = hf.flag("attention_bias", False)
    attention = grouped_attention(hf, sizes, num_kv_heads=32, qkv_bias=bias, output_bias=bias, qk_norm="head")
    first_sparse = hf.integer("first_k_dense_replace", default=0, low=0)
    dense_size = hf.integer("intermediate_size", default=10944)
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=10_000.0),
        moe=correction_gate(hf, intermediate_size=1408, normalize=False),
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers[first_sparse:], dense_size, windows),
        rms_norm_eps=1e-6,
    )
