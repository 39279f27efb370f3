"""DeepSeek-V2 (`DeepseekV2ForCausalLM`): latent attention, softmax gate with groups that is not renormalised, shared
experts, the first layers dense."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig, MoEConfig, layers_alike
from moe_runtime.models.decoder_config import model_config, read_groups, read_latent_attention, read_sizes
from moe_runtime.models.hf_config import HFConfig
from moe_runtime.models.names import TensorNames

NAMES = TensorNames()


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `DeepseekV2Config`."""
    hf = HFConfig(config, "deepseek_v2")
    hf.require("hidden_act", ("silu",), "silu")
    hf.always(scoring_func="softmax", norm_topk_prob=False, mlp_bias=False, moe_layer_freq=1, ep_size=1)
    sizes = read_sizes(hf, vocab_size=102400, hidden_size=4096, num_layers=32, num_heads=32, max_position=2048)
    attention, rope = read_latent_attention(
        hf,
        num_heads=sizes.num_heads,
        query_rank=1536,
        latent_size=512,
        nope_size=128,
        rope_size=64,
        value_size=128,
        max_position=sizes.max_position,
    )
    method = hf.require("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    groups = read_groups(hf, (1, 1))
    num_groups, topk_groups = groups if method == "group_limited_greedy" else (1, 1)
    intermediate_size = hf.integer("moe_intermediate_size", default=1407)
    moe = MoEConfig(
        num_experts=hf.integer("num_experts", "n_routed_experts", default=64),
        top_k=hf.integer("num_experts_per_tok"),
        intermediate_size=intermediate_size,
        shared_intermediate_size=intermediate_size * hf.integer("n_shared_experts", default=2),
        normalize_topk=False,
        routed_scaling_factor=hf.positive("routed_scaling_factor", 1.0),
        num_groups=num_groups,
        topk_groups=topk_groups,
        groups_by_best=True,
        gate_float32=True,
    )
    first_sparse = hf.integer("first_k_dense_replace", default=0, low=0)
    dense_size = hf.integer("intermediate_size", default=11008)
    return model_config(
        hf,
        sizes,
        rope=rope,
        moe=moe,
        layers=layers_alike(sizes.num_layers, attention, sizes.all_layers[first_sparse:], dense_size),
        rms_norm_eps=1e-6,
    )
