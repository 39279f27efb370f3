"""Mixtral (`MixtralForCausalLM`): softmax gate renormalised over the top k, every layer sparse."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import grouped_attention, model_config, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import SwiGLUNames, TensorNames
from moe_runtime.models.rope import read_rope

NAMES = TensorNames(sparse="block_sparse_moe", expert_parts=SwiGLUNames(gate="w1", up="w3", down="w2"))


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `MixtralConfig`."""
    hf = HFConfig(config, "mixtral")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(norm_topk_prob=True, scoring_func="softmax", decoder_sparse_step=1)
    hf.always(n_group=1, topk_group=1, routed_scaling_factor=1.0)
    sizes = read_sizes(hf, vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, max_position=4096 * 32)
    window = hf.window()
    attention = grouped_attention(hf, sizes, num_kv_heads=8, sliding_window=window)
    moe = MoEConfig(
        num_experts=hf.integer("num_experts", "num_local_experts", default=8),
        top_k=hf.integer("num_experts_per_tok", default=2),
        intermediate_size=hf.integer("intermediate_size", default=14336),
    )
    return model_config(
        hf,
        sizes,
        rope=read_rope(hf, attention.head_dim, sizes.max_position, theta=1_000_000.0),
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers, moe.intermediate_size),
        rms_norm_eps=1e-5,
    )
