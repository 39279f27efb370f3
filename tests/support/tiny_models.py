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
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM"),
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
}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **values}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# name -> (family, settings); together they cover every feature of the three families.
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
}


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
            if name.endswith("gate.weight"):
                tensor.mul_(4.0)  # clear choices, so that rounding does not flip an expert
    return model


def save(model: Any, path: Path, **options: Any) -> Path:
    """Write a checkpoint as transformers does."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(path, **options)
    return path


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
