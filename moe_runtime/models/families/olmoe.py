"""OLMoE (`OlmoeForCausalLM`): q/k norm over all heads of a token, softmax gate, every layer sparse."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames()


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `OlmoeConfig`."""
    hf = HFConfig(config, "olmoe")
    hf.require("hidden_act", ("silu",), "silu")
    sizes = read_sizes(hf, vocab_size=50304, hidden_size=2048, num_layers=16, num_heads=16, max_position=4096)
    bias = hf.flag("attention_bias", False)
    attention = grouped_attention(hf, sizes, num_kv_heads=None, qkv_bias=bias, output_bias=bias, qk_norm="token")
    moe = MoEConfig(
        num_experts=hf.integer("num_local_experts", "num_experts", default=64),
        top_k=hf.integer("num_experts_per_tok", default=8),
        intermediate_size=hf.integer("intermediate_size", default=2048),
        normalize_topk=hf.flag("norm_topk_prob", False),
    )
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=10_000.0),
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers, moe.intermediate_size),
        rms_norm_eps=1e-5,
    )
