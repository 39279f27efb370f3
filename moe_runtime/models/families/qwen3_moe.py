"""Qwen3-MoE (`Qwen3MoeForCausalLM`): q/k norm, softmax gate, dense layers among sparse ones, no shared experts."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import AttentionConfig, ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames

NAMES = TensorNames()


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `Qwen3MoeConfig`."""
    hf = HFConfig(config, "qwen3_moe")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(use_qk_norm=True, scoring_func="softmax", n_group=1, topk_group=1, routed_scaling_factor=1.0)
    hidden_size = hf.integer("hidden_size", default=2048)
    num_layers = hf.integer("num_hidden_layers", default=24)
    num_heads = hf.integer("num_attention_heads", default=32)
    head_dim = hf.head_dim(hidden_size, num_heads)
    max_position = hf.integer("max_position_embeddings", default=32768)
    window = hf.window(default=4096)
    if not hf.flag("use_sliding_window", False):
        window = None
    bias = hf.flag("attention_bias", False)
    dense = hf.layer_numbers("mlp_only_layers")
    stride = hf.integer("decoder_sparse_step", default=1)
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=hf.integer("num_key_value_heads", default=4),
        head_dim=head_dim,
        sliding_window=window,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
    model = ModelConfig(
        family="qwen3_moe",
        vocab_size=hf.integer("vocab_size", default=151936),
        hidden_size=hidden_size,
        rms_norm_eps=hf.number("rms_norm_eps", default=1e-6),
        max_position_embeddings=max_position,
        rope=hf.rope(head_dim, max_position, theta=10_000.0),
        moe=MoEConfig(
            num_experts=hf.integer("num_local_experts", "num_experts", default=128),
            top_k=hf.integer("num_experts_per_tok", default=8),
            intermediate_size=hf.integer("moe_intermediate_size", default=768),
            normalize_topk=hf.flag("norm_topk_prob", False),
        ),
        layers=layers_alike(
            num_layers,
            attention,
            [i for i in range(num_layers) if i not in dense and (i + 1) % stride == 0],
            hf.integer("intermediate_size", default=6144),
        ),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
        dtype=hf.dtype,
        eos_token_ids=hf.eos_token_ids,
    )
    hf.layer_types(num_layers, window)
    hf.finish()
    return model
