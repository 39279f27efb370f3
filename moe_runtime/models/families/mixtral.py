"""Mixtral (`MixtralForCausalLM`): softmax gate renormalised over the top k, every layer sparse."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import AttentionConfig, ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import SwiGLUNames, TensorNames

NAMES = TensorNames(sparse="block_sparse_moe", expert_parts=SwiGLUNames(gate="w1", up="w3", down="w2"))


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `MixtralConfig`."""
    hf = HFConfig(config, "mixtral")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(norm_topk_prob=True, scoring_func="softmax", decoder_sparse_step=1)
    hf.always(n_group=1, topk_group=1, routed_scaling_factor=1.0)
    hidden_size = hf.integer("hidden_size", default=4096)
    num_layers = hf.integer("num_hidden_layers", default=32)
    num_heads = hf.integer("num_attention_heads", default=32)
    head_dim = hf.head_dim(hidden_size, num_heads)
    max_position = hf.integer("max_position_embeddings", default=4096 * 32)
    intermediate_size = hf.integer("intermediate_size", default=14336)
    window = hf.window()
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=hf.integer("num_key_value_heads", default=8),
        head_dim=head_dim,
        sliding_window=window,
    )
    model = ModelConfig(
        family="mixtral",
        vocab_size=hf.integer("vocab_size", default=32000),
        hidden_size=hidden_size,
        rms_norm_eps=hf.number("rms_norm_eps", default=1e-5),
        max_position_embeddings=max_position,
        rope=hf.rope(head_dim, max_position, theta=1_000_000.0),
        moe=MoEConfig(
            num_experts=hf.integer("num_experts", "num_local_experts", default=8),
            top_k=hf.integer("num_experts_per_tok", default=2),
            intermediate_size=intermediate_size,
        ),
        layers=layers_alike(num_layers, attention, range(num_layers), intermediate_size),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
        dtype=hf.dtype,
        eos_token_ids=hf.eos_token_ids,
    )
    hf.layer_types(num_layers, window)
    hf.finish()
    return model
