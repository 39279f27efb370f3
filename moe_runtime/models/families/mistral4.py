"""Mistral Small 4 (`Mistral4ForCausalLM`): latent attention whose queries grow with the position, softmax gate with
groups renormalised over the top k, a shared expert."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import model_config, read_groups, read_latent_attention, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames

NAMES = TensorNames()
# What transformers' class has where a configuration has no rope parameters.
ROPE = {
    "type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `Mistral4Config`."""
    hf = HFConfig(config, "mistral4")
    hf.require("hidden_act", ("silu",), "silu")
    sizes = read_sizes(hf, vocab_size=131072, hidden_size=4096, num_layers=36, num_heads=32, max_position=1048576)
    attention, rope = read_latent_attention(
        hf,
        num_heads=sizes.num_heads,
        query_rank=1024,
        latent_size=256,
        nope_size=64,
        rope_size=64,
        value_size=128,
        max_position=sizes.max_position,
        interleaved=hf.flag("rope_interleave", True),
        rotary_share=True,
        absent_rope=ROPE,
    )
    num_groups, topk_groups = read_groups(hf, (1, 1))
    intermediate_size = hf.integer("moe_intermediate_size", default=2048)
    moe = MoEConfig(
        num_experts=hf.integer("num_local_experts", "n_routed_experts", default=128),
        top_k=hf.integer("num_experts_per_tok", default=4),
        intermediate_size=intermediate_size,
        shared_intermediate_size=intermediate_size * hf.integer("n_shared_experts", default=1),
        normalize_topk=hf.flag("norm_topk_prob", True),
        routed_scaling_factor=hf.positive("routed_scaling_factor", 1.0),
        num_groups=num_groups,
        topk_groups=topk_groups,
    )
    first_sparse = hf.integer("first_k_dense_replace", default=0, low=0)
    dense_size = hf.integer("intermediate_size", default=12288)
    return model_config(
        hf,
        sizes,
        rope=rope,
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers[first_sparse:], dense_size),
        rms_norm_eps=1e-6,
    )
