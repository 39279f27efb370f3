"""Which pages a sequence holds, against counting them one by one; how memory is divided among page groups."""

from __future__ import annotations

import dataclasses

import pytest
from fakes import model_config
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.config.engine import EngineConfig
from moe_runtime.memory.budget import num_cache_pages
from moe_runtime.memory.model_size import cache_bytes, page_bytes
from moe_runtime.memory.page_group import PageGroup, page_groups


def held(group: PageGroup, chunk: range) -> set[int]:
    """Pages of a chunk's rows and of what they read."""
    first = 0 if group.window is None else max(0, chunk.start - group.window + 1)
    return {position // group.block_size for position in range(first, chunk.stop)}


@given(
    window=st.none() | st.integers(1, 40),
    block_size=st.integers(1, 9),
    max_chunk=st.integers(1, 30),
    num_tokens=st.integers(1, 90),
    cuts=st.lists(st.integers(1, 30)),
)
def test_the_most_pages_are_never_exceeded_and_can_be_needed(window, block_size, max_chunk, num_tokens, cuts):
    group = PageGroup(window, block_size, max_chunk)
    start, largest = 0, 0
    for cut in [*cuts, *[max_chunk] * num_tokens]:
        chunk = range(start, min(num_tokens, start + min(cut, max_chunk)))
        if not chunk:
            break
        pages = held(group, chunk)
        assert min(pages) == group.first_read(chunk.start) and max(pages) == group.count(chunk.stop) - 1
        assert len(pages) <= group.most(num_tokens)
        largest = max(largest, len(held(group, range(chunk.stop - 1, chunk.stop))))
        start = chunk.stop
    assert largest <= group.most_decoding(num_tokens)
    chunks = [range(at, at + max_chunk) for at in range(num_tokens - max_chunk + 1)] or [range(num_tokens)]
    assert group.most(num_tokens) - max(len(held(group, chunk)) for chunk in chunks) in (0, 1)


WINDOWS = [(None,), (6,), (None, 6), (6, None, 30)]


@pytest.mark.parametrize("windows", WINDOWS)
@given(memory=st.integers(0, 400_000), max_num_seqs=st.integers(1, 40), max_model_len=st.integers(1, 64))
def test_memory_is_used_and_a_sequence_fits(windows, memory, max_num_seqs, max_model_len):
    model = model_config(windows=windows)
    tokens = max(max_num_seqs, 20)
    engine = EngineConfig(
        "m", max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=8, max_num_batched_tokens=tokens
    )
    groups, sizes = page_groups(engine, model), page_bytes(model, 8, "float32")
    least = [group.most(max_model_len) for group in groups]
    if memory < cache_bytes(least, sizes):
        with pytest.raises(ValueError, match=rf"give at least {cache_bytes(least, sizes)} bytes"):
            num_cache_pages(engine, model, "float32", memory)
        return
    found = num_cache_pages(engine, model, "float32", memory)
    most = [group.most_of_step(max_num_seqs, max_model_len) for group in groups]
    assert cache_bytes(found, sizes) <= memory
    assert all(low <= count <= high for low, count, high in zip(least, found, most, strict=True))
    left = memory - cache_bytes(found, sizes)
    assert list(found) == most or left < sum(sizes), "what is left is less than a page of each group"
    growing = [count for count, low, high in zip(found, least, most, strict=True) if low < count < high]
    assert len(set(growing)) <= 1, "groups that can use more have the same number of pages"


def test_a_window_makes_room_for_more_tokens():
    """Half of the layers have a window of two pages: the same memory holds about twice as many tokens."""
    full, half = model_config(windows=(None, None, 9)), model_config(windows=(None, 9, 9))
    full = dataclasses.replace(full, layers=full.layers[:2])
    half = dataclasses.replace(half, layers=half.layers[:2])
    engine = EngineConfig("m", max_num_seqs=2, max_model_len=2000, block_size=8, max_num_batched_tokens=8)
    memory = 300 * page_bytes(full, 8, "float32")[0]
    assert num_cache_pages(engine, full, "float32", memory) == (300,)
    assert num_cache_pages(engine, half, "float32", memory) == (500, 5)
