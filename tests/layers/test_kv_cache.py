"""How many pages a rank reserves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fakes import model_config
from tiny_models import make_model, save

from moe_runtime.config.attention import AttentionConfig
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import LayerConfig, ModelConfig
from moe_runtime.layers.kv_cache import KVCache, available_host_memory, choose_num_pages
from moe_runtime.memory.model_size import cache_bytes, decode_bytes, page_bytes
from moe_runtime.models.registry import read_model_config
from moe_runtime.wire.messages import PageCopy

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return read_model_config(save(make_model("glm4"), tmp_path))


def test_a_page_is_as_large_as_its_tensors(model: ModelConfig) -> None:
    for dtype in ("float32", "bfloat16"):
        cache = KVCache(model, [5], 16, dtype, CPU)
        assert cache.nbytes == 5 * page_bytes(model, 16, dtype)[0]
        for index, layer in enumerate(model.layers):
            for stored in (cache.layer(index).k_NBGd, cache.layer(index).v_NBGe):
                assert stored.shape == (5, 16, layer.attention.num_kv_heads, layer.attention.head_dim)
                assert stored.is_contiguous() and not stored.any()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("case", ["glm4", "deepseek3"])
def test_a_page_of_8_bits_is_one_block_in_each_layer(tmp_path: Path, case: str, dtype: str) -> None:
    model = read_model_config(save(make_model(case), tmp_path))
    cache, (page,) = KVCache(model, [5], 8, dtype, CPU), page_bytes(model, 8, dtype)
    assert cache.nbytes == 5 * page
    size = page // model.num_layers
    for index in range(model.num_layers):
        layer = cache.layer(index)
        assert layer.scales is not None
        parts = [layer.k_NBGd, layer.v_NBGe, layer.scales.k_NBGP, layer.scales.v_NBG1]
        if case == "deepseek3":  # values and their scales are within those of keys
            assert [part.data_ptr() for part in parts[::2]] == [part.data_ptr() for part in parts[1::2]]
            parts = parts[::2]
        assert sum(part[0].nbytes for part in parts) == size and {part.stride(0) * part.itemsize for part in parts} == {
            size
        }
        for value, part in enumerate(parts, 1):
            assert not part[2].view(torch.uint8).any()
            part[2].view(torch.uint8).fill_(value)
        bytes_of_page = cache._kept.view(model.num_layers, 5, size)[index, 2]
        counts = [part[0].nbytes for part in parts]
        assert bytes_of_page.bincount(minlength=len(parts) + 1).tolist() == [0, *counts]
    assert not cache._kept.view(model.num_layers, 5, size)[:, [0, 1, 3, 4]].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("case", ["gpt-oss", "deepseek3"])
def test_copied_pages_are_equal_in_all_layers_of_the_group(tmp_path: Path, case: str, dtype: str) -> None:
    model = read_model_config(save(make_model(case), tmp_path))
    cache = KVCache(model, [6] * len(model.windows), 8, dtype, CPU)
    cache._kept.random_(0, 100)

    def pages(index: int) -> list[torch.Tensor]:
        layer = cache.layer(index)
        parts = [layer.k_NBGd, layer.v_NBGe]
        if layer.scales is not None:
            parts += [layer.scales.k_NBGP, layer.scales.v_NBG1]
        return [part.contiguous().view(torch.uint8).clone() for part in parts]

    before = [pages(index) for index in range(model.num_layers)]
    # A source may be the target of another copy: it is read first.
    cache.copy_pages([PageCopy(0, 1, 4), PageCopy(0, 3, 1), PageCopy(0, 1, 5)])
    cache.copy_pages([])
    order = [0, 3, 2, 3, 1, 1]
    for index, group in enumerate(model.page_groups):
        for old, new in zip(before[index], pages(index), strict=True):
            assert torch.equal(new, old[order] if group == 0 else old)


def test_no_more_than_the_sequences_can_use(model: ModelConfig) -> None:
    engine = EngineConfig("m", max_num_seqs=3, max_model_len=50, block_size=16)
    assert choose_num_pages(engine, model, "float32", CPU, 1) == (3 * 4,)


def test_no_more_than_the_memory_that_is_given(model: ModelConfig) -> None:
    (page,) = page_bytes(model, 8, "float32")
    engine = EngineConfig("m", max_num_seqs=8, max_model_len=64, block_size=8, kv_cache_memory_bytes=11 * page - 1)
    assert choose_num_pages(engine, model, "float32", CPU, 1) == (10,)


def test_half_of_free_memory_is_shared_by_the_ranks_of_a_host(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (page,) = page_bytes(model, 16, "float32")
    monkeypatch.setattr("moe_runtime.layers.kv_cache.available_host_memory", lambda: 80 * page)
    engine = EngineConfig("m", max_num_seqs=64, max_model_len=96)
    assert choose_num_pages(engine, model, "float32", CPU, 1) == (40,)
    assert choose_num_pages(engine, model, "float32", CPU, 4) == (10,)


def test_a_cache_that_holds_no_whole_sequence_is_refused(model: ModelConfig) -> None:
    (page,) = page_bytes(model, 16, "float32")
    engine = EngineConfig("m", max_model_len=90, kv_cache_memory_bytes=5 * page)
    message = (
        rf"^kv_cache_memory_bytes: {5 * page} bytes per rank do not hold a sequence of max_model_len 90; "
        rf"give at least {6 * page} bytes, or reduce max_model_len$"
    )
    with pytest.raises(ValueError, match=message):
        choose_num_pages(engine, model, "float32", CPU, 1)
    enough = dataclasses.replace(engine, kv_cache_memory_bytes=6 * page)
    assert choose_num_pages(enough, model, "float32", CPU, 1) == (6,)


def test_free_memory_is_that_of_this_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available_host_memory() < total


def test_layers_may_keep_different_heads() -> None:
    """The cache, a page's bytes and the budget follow each layer's own specification."""
    wide, narrow = AttentionConfig(4, 2, 16), AttentionConfig(4, 1, 8, sliding_window=7)
    model = dataclasses.replace(
        model_config(), layers=(LayerConfig.of(wide, None), LayerConfig.of(narrow, None), LayerConfig.of(wide, 8))
    )
    cache = KVCache(model, [3, 2], 8, "bfloat16", CPU)
    assert [cache.layer(index).k_NBGd.shape for index in range(3)] == [(3, 8, 2, 16), (2, 8, 1, 8), (3, 8, 2, 16)]
    assert page_bytes(model, 8, "bfloat16") == (8 * 2 * 2 * 2 * 32, 8 * 2 * 2 * 8)
    assert cache.nbytes == cache_bytes([3, 2], page_bytes(model, 8, "bfloat16"))
    assert [spec.kind for spec in model.kv_specs("bfloat16")] == ["full", "window", "full"]
    long, short = (decode_bytes(model, "float32", 1, context_len=length) for length in (30, 20))
    assert long - short == 10 * 2 * 4 * 2 * 32, "the layer with a window reads no more"
    cache.layer(1).k_NBGd.fill_(1)
    assert not cache.layer(0).k_NBGd.any() and not cache.layer(2).k_NBGd.any() and not cache.layer(1).v_NBGe.any()
