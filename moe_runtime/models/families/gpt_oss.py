"""gpt-oss (`GptOssForCausalLM`): attention with sinks and biases, windows in every other layer, a gate with a bias
renormalised over the top k, experts with biases and a clamped SwiGLU, every layer sparse."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames(
    gate="router.weight",
    gate_bias="router.bias",
    sinks="self_attn.sinks",
    fused_is_transposed=True,
    fused_is_interleaved=True,
)
# What transformers' class has where a configuration has no rope parameters.
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `GptOssConfig`."""
    hf = HFConfig(config, "gpt_oss")
    hf.require("hidden_act", ("silu",), "silu")
    sizes = read_sizes(hf, vocab_size=201088, hidden_size=2880, num_layers=36, num_heads=64, max_position=131072)
    window = hf.window(default=128)
    windows = hf.layer_windows([window is not None and index % 2 == 0 for index in sizes.all_layers], window)
    bias = hf.flag("attention_bias", True)
    attention = grouped_attention(hf, sizes, num_kv_heads=8, head_dim=64, qkv_bias=bias, output_bias=bias, sinks=True)
    moe = MoEConfig(
        num_experts=hf.integer("num_experts", "num_local_experts", default=128),
        top_k=hf.integer("num_experts_per_tok", "experts_per_token", default=4),
        intermediate_size=hf.integer("intermediate_size", default=2880),
        gate_bias=True,
        expert_bias=True,
        swiglu_alpha=hf.positive("swiglu_alpha", 1.702),
        swiglu_limit=hf.positive("swiglu_limit", 7.0),
        swiglu_offset=1.0,
    )
    hf.get("initial_context_length")  # says what the rope parameters say
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=150_000.0, absent=ROPE),
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers, moe.intermediate_size, windows),
        rms_norm_eps=1e-5,
    )
