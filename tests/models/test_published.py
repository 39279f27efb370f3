"""Configurations of published models, without their quantisation: sizes that their cards state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.config.engine import EngineConfig
from moe_runtime.memory.model_size import cache_bytes, count_parameters, kv_bytes_per_token, page_bytes
from moe_runtime.memory.page_group import page_groups
from moe_runtime.models.registry import read_model_config

CONFIGS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published_configs.json").read_text())
# Name -> parameters, active parameters (both in billions, as cards round them), bytes kept of a token in bfloat16.
# The last is 2 * layers * heads * head size elements, or layers * (latent + rotated key).
FACTS = {
    "Qwen/Qwen3-30B-A3B": (30.5, 3.4, 2 * 2 * 48 * 4 * 128),
    "Qwen/Qwen3-235B-A22B": (235.1, 22.2, 2 * 2 * 94 * 4 * 128),
    "deepseek-ai/DeepSeek-V2-Lite": (15.7, 2.7, 2 * 27 * (512 + 64)),
    "deepseek-ai/DeepSeek-V3": (671.0, 37.6, 2 * 61 * (512 + 64)),
    "moonshotai/Kimi-K2-Instruct": (1026.4, 32.9, 2 * 61 * (512 + 64)),
    "openai/gpt-oss-20b": (20.9, 4.2, 2 * 2 * 24 * 8 * 64),
    "openai/gpt-oss-120b": (116.8, 5.7, 2 * 2 * 36 * 8 * 64),
    "zai-org/GLM-4.5-Air": (106.9, 13.4, 2 * 2 * 46 * 8 * 128),
    "zai-org/GLM-4.7-Flash": (29.9, 3.9, 2 * 47 * (512 + 64)),
    "MiniMaxAI/MiniMax-M2": (228.7, 11.0, 2 * 2 * 62 * 8 * 128),
    "allenai/OLMoE-1B-7B-0924": (6.9, 1.3, 2 * 2 * 16 * 16 * 128),
    "Qwen/Qwen1.5-MoE-A2.7B": (14.3, 2.7, 2 * 2 * 24 * 16 * 128),
    "baidu/ERNIE-4.5-21B-A3B-PT": (21.8, 3.4, 2 * 2 * 28 * 4 * 128),
    "tencent/Hunyuan-A13B-Instruct": (80.4, 12.7, 2 * 2 * 32 * 8 * 128),
    "ibm-granite/granite-3.1-3b-a800m-instruct": (3.3, 0.9, 2 * 2 * 32 * 8 * 64),
    "mistralai/Mixtral-8x7B-v0.1": (46.7, 12.9, 2 * 2 * 32 * 8 * 128),
    "mistralai/Mistral-Small-4-119B-2603": (119.0, 6.6, 2 * 36 * (256 + 64)),
    "rednote-hilab/dots.llm1.inst": (142.8, 14.0, 2 * 2 * 62 * 32 * 128),
    "upstage/Solar-Open-100B": (102.7, 12.1, 2 * 2 * 48 * 8 * 128),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_configuration_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    model = read_model_config(tmp_path)
    assert model.num_layers == CONFIGS[name]["num_hidden_layers"]
    if name in FACTS:
        count = count_parameters(model)
        found = round(count.total / 1e9, 1), round(count.active / 1e9, 1), kv_bytes_per_token(model, "bfloat16")
        assert found == FACTS[name]


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("zai-org/GLM-4.7-Flash", 10.98), ("openai/gpt-oss-20b", 3.22), ("deepseek-ai/DeepSeek-V3", 11.51)],
)
def test_pages_of_a_long_sequence(tmp_path: Path, name: str, gigabytes: float) -> None:
    """What a sequence of the longest context holds: latents, and behind a window nothing."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    model = read_model_config(tmp_path)
    groups, sizes = page_groups(EngineConfig("m"), model), page_bytes(model, 16, "bfloat16")
    held = [group.most_decoding(model.max_model_len) for group in groups]
    assert round(cache_bytes(held, sizes) / 1e9, 2) == gigabytes
