"""GLM-4.7-Flash (`Glm4MoeLiteForCausalLM`): latent attention, sigmoid gate with correction bias and groups, shared
experts, the first layer dense. Layers for multi-token prediction are not read."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, layers_alike
from moe_runtime.models.decoder_config import correction_gate, model_config, read_latent_attention, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames

NAMES = TensorNames()


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `Glm4MoeLiteConfig`."""
    hf = HFConfig(config, "glm4_moe_lite")
    hf.require("hidden_act", ("silu",), "silu")
    sizes = read_sizes(hf, vocab_size=154880, hidden_size=2048, num_layers=47, num_heads=20, max_position=202752)
    attention, rope = read_latent_attention(
        hf,
        num_heads=sizes.num_heads,
        query_rank=768,
        latent_size=512,
        nope_size=192,
        rope_size=64,
        value_size=256,
        max_position=sizes.max_position,
        interleaved=hf.flag("rope_interleave", True),
    )
    moe = correction_gate(hf, num_experts=64, top_k=4, intermediate_size=1536, num_shared=1, scaling=1.8)
    sparse = hf.sparse_of_types("mlp_layer_types", sizes.num_layers)
    if sparse is None:  # then transformers does not read the number of dense layers
        hf.always(first_k_dense_replace=1)
        sparse = list(sizes.all_layers[1:])
    dense_size = hf.integer("intermediate_size", default=10240)
    return model_config(
        hf,
        sizes,
        rope=rope,
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sparse, dense_size),
        rms_norm_eps=1e-5,
    )
