"""DeepSeek-V3, R1 and Kimi K2 (`DeepseekV3ForCausalLM`): latent attention, sigmoid gate with correction bias and
groups, shared experts, the first layers dense. Layers for multi-token prediction are not read."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, layers_alike
from moe_runtime.models.decoder_config import correction_gate, model_config, read_latent_attention, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames

NAMES = TensorNames()


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `DeepseekV3Config`."""
    hf = HFConfig(config, "deepseek_v3")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(moe_layer_freq=1, ep_size=1)
    sizes = read_sizes(hf, vocab_size=129280, hidden_size=7168, num_layers=61, num_heads=128, max_position=4096)
    attention, rope = read_latent_attention(
        hf,
        num_heads=sizes.num_heads,
        query_rank=1536,
        latent_size=512,
        nope_size=128,
        rope_size=64,
        value_size=128,
        max_position=sizes.max_position,
        interleaved=hf.flag("rope_interleave", True),
    )
    moe = correction_gate(
        hf, num_experts=256, top_k=8, intermediate_size=2048, num_shared=1, scaling=2.5, groups=(8, 4)
    )
    first_sparse = hf.integer("first_k_dense_replace", default=3, low=0)
    dense_size = hf.integer("intermediate_size", default=18432)
    return model_config(
        hf,
        sizes,
        rope=rope,
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers[first_sparse:], dense_size),
        rms_norm_eps=1e-6,
    )
