"""How many pages a rank reserves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.layers.kv_cache import KVCache, available_host_memory, block_bytes, choose_num_pages
from moe_runtime.models.registry import load_model_config

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return load_model_config(save(make_model("glm4"), tmp_path))


def test_a_page_is_as_large_as_its_tensors(model: ModelConfig) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(model, 5, 16, dtype, CPU)
        assert cache.nbytes == 5 * block_bytes(model, 16, dtype)
        assert cache.layer(1).k_NBGd.shape == (5, 16, model.num_kv_heads, model.head_dim)
        assert not cache.keys.any() and not cache.values.any()


def test_no_more_than_the_sequences_can_use(model: ModelConfig) -> None:
    engine = EngineConfig("m", max_num_seqs=3, max_model_len=50, block_size=16)
    assert choose_num_pages(engine, model, torch.float32, CPU, 1) == 3 * 4


def test_no_more_than_the_memory_that_is_given(model: ModelConfig) -> None:
    page = block_bytes(model, 8, torch.float32)
    engine = EngineConfig("m", max_num_seqs=8, max_model_len=64, block_size=8, kv_cache_memory_bytes=11 * page - 1)
    assert choose_num_pages(engine, model, torch.float32, CPU, 1) == 10


def test_half_of_free_memory_is_shared_by_the_ranks_of_a_host(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = block_bytes(model, 16, torch.float32)
    monkeypatch.setattr("moe_runtime.layers.kv_cache.available_host_memory", lambda: 80 * page)
    engine = EngineConfig("m", max_num_seqs=64, max_model_len=96)
    assert choose_num_pages(engine, model, torch.float32, CPU, 1) == 40
    assert choose_num_pages(engine, model, torch.float32, CPU, 4) == 10


def test_a_cache_that_holds_no_whole_sequence_is_refused(model: ModelConfig) -> None:
    page = block_bytes(model, 16, torch.float32)
    engine = EngineConfig("m", max_model_len=90, kv_cache_memory_bytes=5 * page)
    message = (
        rf"^kv_cache_memory_bytes: {5 * page} bytes a rank hold 80 tokens, but max_model_len is 90; "
        rf"it takes {6 * page} bytes, or a lower max_model_len$"
    )
    with pytest.raises(ValueError, match=message):
        choose_num_pages(engine, model, torch.float32, CPU, 1)
    enough = dataclasses.replace(engine, kv_cache_memory_bytes=6 * page)
    assert choose_num_pages(enough, model, torch.float32, CPU, 1) == 6


def test_free_memory_is_that_of_this_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available_host_memory() < total
