"""Tiny random checkpoints of every family and feature, made with transformers and never stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 97
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
CLASSES = {
    family: (f"{name}Config", f"{name}ForCausalLM")
    for family, name in {
        "qwen3_moe": "Qwen3Moe",
        "mixtral": "Mixtral",
        "glm4_moe": "Glm4Moe",
        "olmoe": "Olmoe",
        "qwen2_moe": "Qwen2Moe",
        "minimax_m2": "MiniMaxM2",
        "dots1": "Dots1",
        "solar_open": "SolarOpen",
        "ernie4_5_moe": "Ernie4_5_Moe",
        "hunyuan_v1_moe": "HunYuanMoEV1",
        "granitemoe": "GraniteMoe",
        "granitemoeshared": "GraniteMoeShared",
        "deepseek_v3": "DeepseekV3",
        "deepseek_v2": "DeepseekV2",
        "glm4_moe_lite": "Glm4MoeLite",
        "mistral4": "Mistral4",
        "gpt_oss": "GptOss",
    }.items()
}
LATENT = {
    "num_key_value_heads": BASE["num_attention_heads"],
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 14,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 3,
}
GRANITE = {
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.4,
    "logits_scaling": 6.0,
}
FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    "olmoe": {"hidden_size": 96, "num_experts": 9, "num_experts_per_tok": 4},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 28,
    },
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 3, "rotary_dim": 8},
    "dots1": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "solar_open": {"n_routed_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": 5, "moe_topk": 2},
    "granitemoe": GRANITE,
    "granitemoeshared": {**GRANITE, "shared_intermediate_size": 28},
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
    },
    "deepseek_v2": {**LATENT, "n_routed_experts": 8, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**LATENT, "n_routed_experts": 9},
    "mistral4": {**LATENT, "head_dim": 20, "n_routed_experts": 8},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 7, "swiglu_limit": 0.8},
}
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
GATES = ("gate.weight", "gate.wg.weight", "router.weight")


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **values}}


MSCALE = {"mscale": 0.8, "mscale_all_dim": 0.7}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# name -> (family, settings); together they cover every feature of the families.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3_moe", {}),
    "qwen3 normalised": ("qwen3_moe", {"norm_topk_prob": True, "rms_norm_eps": 1e-3}),
    "qwen3 dense between": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "qwen3 sparse step": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "qwen3 bias, tied": ("qwen3_moe", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3 window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7}),
    "qwen3 yarn": ("qwen3_moe", rope("yarn", factor=3.0, original_max_position_embeddings=32)),
    "qwen3 one head a group": ("qwen3_moe", {"num_key_value_heads": 6}),
    "mixtral": ("mixtral", {}),
    "mixtral window": ("mixtral", {"sliding_window": 20}),
    "mixtral linear": ("mixtral", rope("linear", factor=2.5)),
    "mixtral dynamic": ("mixtral", {"max_position_embeddings": 32, **rope("dynamic", factor=3.0)}),
    "mixtral llama3": ("mixtral", rope("llama3", **LLAMA3)),
    "glm4": ("glm4_moe", {}),
    "glm4 groups": ("glm4_moe", {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7}),
    "glm4 norm, bias": ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "norm_topk_prob": False}),
    "glm4 partial yarn": (
        "glm4_moe",
        {"first_k_dense_replace": 0}
        | rope("yarn", factor=2.0, original_max_position_embeddings=48, partial_rotary_factor=0.75),
    ),
    "olmoe": ("olmoe", {}),
    "olmoe bias, normalised": ("olmoe", {"attention_bias": True, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "qwen2 windows": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "qkv_bias": False},
    ),
    "minimax": ("minimax_m2", {}),
    "dots1": ("dots1", {"attention_bias": True}),
    "dots1 windows, groups": (
        "dots1",
        {"sliding_window": 9, "max_window_layers": 1, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
    ),
    "solar": ("solar_open", {"attention_bias": True}),
    "solar yarn, groups": (
        "solar_open",
        {"n_group": 2, "topk_group": 1, **rope("yarn", factor=2.0, original_max_position_embeddings=48)},
    ),
    "ernie": ("ernie4_5_moe", {}),
    "ernie sparse between": (
        "ernie4_5_moe",
        {"moe_layer_interval": 2, "moe_layer_end_index": 1, "moe_num_shared_experts": 0, "tie_word_embeddings": False},
    ),
    "hunyuan": ("hunyuan_v1_moe", {"attention_bias": True}),
    "hunyuan alpha": ("hunyuan_v1_moe", rope("dynamic", alpha=1000.0, factor=1.0)),
    "granite": ("granitemoe", {"attention_bias": True}),
    "granite shared": ("granitemoeshared", {"tie_word_embeddings": True}),
    "gpt-oss": (
        "gpt_oss",
        rope("yarn", factor=3.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=32),
    ),
    "gpt-oss all full": (
        "gpt_oss",
        {"layer_types": ["full_attention"] * 3, "attention_bias": False, **rope("default")},
    ),
    "deepseek3": ("deepseek_v3", rope("yarn", factor=4.0, original_max_position_embeddings=24, **MSCALE)),
    "deepseek3 odd sizes": (
        "deepseek_v3",
        {"q_lora_rank": None, "kv_lora_rank": 27, "qk_nope_head_dim": 11, "v_head_dim": 13, "rope_interleave": False},
    ),
    "deepseek3 bias": ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    "deepseek2": ("deepseek_v2", rope("yarn", factor=4.0, original_max_position_embeddings=24, **MSCALE)),
    "deepseek2 groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0},
    ),
    "deepseek2 groups of one": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 4, "q_lora_rank": None},
    ),
    "glm4 lite": ("glm4_moe_lite", {"attention_bias": True, "n_shared_experts": 2}),
    "mistral4": (
        "mistral4",
        rope(
            "yarn",
            factor=6.0,
            original_max_position_embeddings=16,
            llama_4_scaling_beta=0.1,
            partial_rotary_factor=0.4,
            **MSCALE,
        ),
    ),
}

# The key of `config.json` that gives the number of experts.
EXPERTS = {family: next(key for key in settings if key in EXPERT_KEYS) for family, settings in FAMILY.items()}
TOP_K = {"ernie4_5_moe": "moe_k", "hunyuan_v1_moe": "moe_topk"}  # else num_experts_per_tok


# Of each family the case that is named first.
FIRST_CASES = list({family: case for case, (family, _) in reversed(CASES.items())}.values())[::-1]


def all_experts(case: str) -> dict[str, int]:
    """Settings with which a token uses all experts."""
    family, _ = CASES[case]
    every = {TOP_K.get(family, "num_experts_per_tok"): FAMILY[family][EXPERTS[family]]}
    return every | ({"n_group": 1, "topk_group": 1} if "n_group" in FAMILY[family] else {})


def make_model(case: str, **overrides: Any) -> Any:
    """A transformers model in float32 with fresh random weights, correction biases included."""
    family, settings = CASES[case]
    config_class, model_class = CLASSES[family]
    config = getattr(transformers, config_class)(**{**BASE, **FAMILY[family], **settings, **overrides})
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("norm.weight", "bias")):
                tensor.add_(torch.randn_like(tensor) * 0.2)
            if name.endswith(GATES):
                tensor.mul_(4.0)  # clear choices, so that rounding does not flip an expert
    return model


def save(model: Any, path: Path, **options: Any) -> Path:
    """Write a checkpoint as transformers does."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(path, **options)
    return path


def load(path: Path, dtype: torch.dtype) -> Any:
    """The checkpoint as transformers loads it. `model.to(dtype)` would round the angles of the rotary embedding too."""
    family = json.loads((path / "config.json").read_text())["model_type"]
    return getattr(transformers, CLASSES[family][1]).from_pretrained(path, dtype=dtype).eval()


def edit_config(path: Path, changes: dict[str, Any]) -> None:
    """Change keys of `config.json`; None removes a key."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    file.write_text(json.dumps(config))
