"""Reading `config.json`: old and new spellings, defaults, and fields that are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import BASE, CASES, CLASSES, FAMILY

from moe_runtime.config.model import AttentionConfig
from moe_runtime.models.registry import read_model_config


def write(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def plain(family: str, **changes: Any) -> dict[str, Any]:
    base = {key: value for key, value in BASE.items() if key != "initializer_range"}
    config = {"model_type": family, **base, **FAMILY[family], **changes}
    return {key: value for key, value in config.items() if value is not ...}


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_writes_is_read(tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    config = getattr(transformers, CLASSES[family][0])(**{**BASE, **FAMILY[family], **settings})
    config.save_pretrained(tmp_path)
    model = read_model_config(tmp_path)
    assert (model.family, model.hidden_size, model.num_layers, model.layers[0].attention.num_kv_heads) == (
        family,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_key_value_heads,
    )
    assert model.moe.num_experts == config.num_local_experts
    assert model.tie_word_embeddings == config.tie_word_embeddings
    assert model.eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 123.0, "factor": 2.0}},
        ),
        (
            {
                "rope_theta": 9.0e3,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
            },
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 9.0e3,
                    "factor": 4.0,
                    "original_max_position_embeddings": 24,
                }
            },
        ),
        ({"rope_theta": 77.0, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("family", FAMILY)
def test_old_and_new_spellings_mean_the_same(
    tmp_path: Path, family: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    first = read_model_config(write(tmp_path, plain(family, **old)))
    assert first == read_model_config(write(tmp_path, plain(family, **new)))


@pytest.mark.parametrize(
    ("family", "one", "other"),
    [
        ("qwen3_moe", "num_experts", "num_local_experts"),
        ("mixtral", "num_local_experts", "num_experts"),
        ("glm4_moe", "n_routed_experts", "num_local_experts"),
    ],
)
def test_spellings_of_the_number_of_experts(tmp_path: Path, family: str, one: str, other: str) -> None:
    number = FAMILY[family][one]
    first = read_model_config(write(tmp_path, plain(family)))
    assert first == read_model_config(write(tmp_path, plain(family, **{one: ..., other: number})))


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    qwen = read_model_config(write(tmp_path, {"model_type": "qwen3_moe"}))
    assert (qwen.moe.num_experts, qwen.moe.normalize_topk, qwen.layers[0].attention) == (
        128,
        False,
        AttentionConfig(32, 4, 64, qk_norm=True),
    )
    mixtral = read_model_config(write(tmp_path, {"model_type": "mixtral"}))
    assert (mixtral.rope.theta, mixtral.moe.top_k, mixtral.moe.intermediate_size) == (1e6, 2, 14336)
    glm = read_model_config(write(tmp_path, {"model_type": "glm4_moe", "hidden_size": 96 * 128}))
    assert (glm.rope.rotary_dim, glm.moe_layers[0], glm.moe.shared_intermediate_size) == (64, 1, 1408)


def test_generation_config_gives_the_stop_ids(tmp_path: Path) -> None:
    write(tmp_path, plain("mixtral", eos_token_id=5))
    assert read_model_config(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_model_config(tmp_path).eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"model_type": "llama"}, ["model_type", "'llama'", "glm4_moe", "mixtral", "qwen3_moe"]),
        ("mixtral", {"model_type": ...}, ["model_type", "None"]),
        ("mixtral", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8"]),
        ("mixtral", {"attn_logit_softcapping": 30.0}, ["attn_logit_softcapping", "30.0"]),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "longrope"}}, ["rope_type", "'longrope'", "yarn"]),
        ("qwen3_moe", {"rope_scaling": {"type": "yarn", "factor": 2.0, "odd": 1}}, ["odd", "'yarn'"]),
        ("qwen3_moe", {"rope_scaling": {"type": "linear"}}, ["factor", "missing", "'linear'"]),
        ("qwen3_moe", {"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ("qwen3_moe", {"num_hidden_layers": "many"}, ["num_hidden_layers", "'many'"]),
        ("qwen3_moe", {"num_key_value_heads": 4}, ["num_key_value_heads", "4", "divide"]),
        ("qwen3_moe", {"num_experts_per_tok": 8}, ["num_experts_per_tok", "8", "7"]),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, ["no sparse layer"]),
        ("glm4_moe", {"n_group": 5}, ["n_group", "5", "12"]),
        ("glm4_moe", {"norm_topk_prob": "yes"}, ["norm_topk_prob", "'yes'", "true or false"]),
        ("glm4_moe", {"scoring_func": "softmax"}, ["scoring_func", "'softmax'", "sigmoid"]),
        ("glm4_moe", {"layer_types": ["sliding_attention"] * 3}, ["layer_types", "sliding_attention"]),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], words: list[str]
) -> None:
    write(tmp_path, plain(family, **changes))
    with pytest.raises(ValueError) as error:
        read_model_config(tmp_path)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_model_config(tmp_path)
    with pytest.raises(ValueError, match="is no directory"):
        read_model_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold a JSON object"):
        read_model_config(tmp_path)
