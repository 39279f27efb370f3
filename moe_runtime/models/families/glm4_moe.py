"""GLM-4.5 and relatives (`Glm4MoeForCausalLM`): sigmoid gate with correction bias and groups, shared experts,
partial rotary, the first layers dense. Layers for multi-token prediction are not read."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import AttentionConfig, ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames

NAMES = TensorNames()


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `Glm4MoeConfig`."""
    hf = HFConfig(config, "glm4_moe")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(scoring_func="sigmoid", topk_method="noaux_tc", decoder_sparse_step=1, moe_layer_freq=1)
    hidden_size = hf.integer("hidden_size", default=4096)
    num_layers = hf.integer("num_hidden_layers", default=46)
    num_heads = hf.integer("num_attention_heads", default=96)
    head_dim = hf.head_dim(hidden_size, num_heads)
    max_position = hf.integer("max_position_embeddings", default=131072)
    moe_intermediate_size = hf.integer("moe_intermediate_size", default=1408)
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=hf.integer("num_key_value_heads", default=8),
        head_dim=head_dim,
        qkv_bias=hf.flag("attention_bias", False),
        qk_norm=hf.flag("use_qk_norm", False),
    )
    model = ModelConfig(
        family="glm4_moe",
        vocab_size=hf.integer("vocab_size", default=151552),
        hidden_size=hidden_size,
        rms_norm_eps=hf.number("rms_norm_eps", default=1e-5),
        max_position_embeddings=max_position,
        rope=hf.rope(head_dim, max_position, theta=10_000.0, rotary_factor=0.5),
        moe=MoEConfig(
            num_experts=hf.integer("num_local_experts", "n_routed_experts", "num_experts", default=128),
            top_k=hf.integer("num_experts_per_tok", default=8),
            intermediate_size=moe_intermediate_size,
            shared_intermediate_size=moe_intermediate_size * hf.integer("n_shared_experts", default=1),
            scoring="sigmoid",
            normalize_topk=hf.flag("norm_topk_prob", True),
            routed_scaling_factor=hf.number("routed_scaling_factor", default=1.0),
            num_groups=hf.integer("n_group", default=1),
            topk_groups=hf.integer("topk_group", default=1),
            correction_bias=True,
            gate_float32=True,
        ),
        layers=layers_alike(
            num_layers,
            attention,
            range(hf.integer("first_k_dense_replace", default=1, low=0), num_layers),
            hf.integer("intermediate_size", default=10944),
        ),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
        dtype=hf.dtype,
        eos_token_ids=hf.eos_token_ids,
    )
    hf.layer_types(num_layers, None)
    hf.finish()
    return model
