import pytest
import torch

from moe_runtime.kernels import ops, reference
from moe_runtime.kernels.ops import AttentionMetadata

CPU = torch.device("cpu")
BLOCK_SIZE = 4


def random_case(num_query, context_len, *, heads=6, groups=2, head_size=8, dtype=torch.float32):
    """Queries, caches and metadata of sequences whose pages lie scattered in the cache."""
    num_pages = [-(-context // BLOCK_SIZE) for context in context_len]
    pages = torch.randperm(sum(num_pages) + 3).tolist()
    blocks = [[pages.pop() for _ in range(count)] for count in num_pages]
    meta = AttentionMetadata.build(num_query, context_len, blocks, CPU)
    shape = (sum(num_pages) + 3, BLOCK_SIZE, groups, head_size)
    k_cache, v_cache = torch.randn(2, *shape).to(dtype)
    return torch.randn(sum(num_query), heads, head_size).to(dtype), k_cache, v_cache, meta


STEPS = {
    "nothing": ([], []),
    "one decode": ([1], [6]),
    "first token": ([1], [1]),
    "decodes": ([1, 1, 1, 1], [1, 13, 8, 4]),
    "whole prompt": ([11], [11]),
    "chunk of a prompt": ([5], [14]),
    "mixed": ([1, 1, 3, 7, 2], [9, 2, 3, 12, 10]),
    "one-row chunk behind a longer one": ([1, 6, 1], [5, 6, 9]),
}


@pytest.mark.parametrize("window", [None, 1, 3, 4, 9, 100])
@pytest.mark.parametrize("step", STEPS)
def test_equals_the_reference(step, window):
    case = random_case(*STEPS[step])
    actual = ops.paged_attention(*case, scale=0.3, sliding_window=window)
    expected = reference.paged_attention(*case, scale=0.3, sliding_window=window)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (8, 1), (12, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_groups_and_dtypes(heads, groups, dtype):
    case = random_case(*STEPS["mixed"], heads=heads, groups=groups, dtype=dtype)
    actual = ops.paged_attention(*case, scale=0.35, sliding_window=None)
    expected = reference.paged_attention(*case, scale=0.35, sliding_window=None)
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 5])
def test_chunks_and_decodes_give_what_the_whole_prompt_gives(window):
    q, k_cache, v_cache, whole = random_case([13], [13])
    blocks = [whole.page_table[0].tolist()]
    expected = ops.paged_attention(q, k_cache, v_cache, whole, scale=0.3, sliding_window=window)
    start = 0
    for size in (4, 3, 1, 1, 4):
        meta = AttentionMetadata.build([size], [start + size], blocks, CPU)
        rows = q[start : start + size]
        part = ops.paged_attention(rows, k_cache, v_cache, meta, scale=0.3, sliding_window=window)
        torch.testing.assert_close(part, expected[start : start + size], rtol=1e-5, atol=1e-5)
        start += size
    assert start == 13


@pytest.mark.parametrize("window", [None, 5])
def test_a_sequence_does_not_see_its_neighbours(window):
    q, k_cache, v_cache, meta = random_case(*STEPS["mixed"])
    together = ops.paged_attention(q, k_cache, v_cache, meta, scale=0.3, sliding_window=window)
    for i, context in enumerate(meta.context_len):
        rows = slice(meta.query_start[i], meta.query_start[i + 1])
        pages = meta.page_table[i, : -(-context // BLOCK_SIZE)]
        only_k, only_v = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
        only_k[pages], only_v[pages] = k_cache[pages], v_cache[pages]
        alone_meta = AttentionMetadata.build([meta.num_query[i]], [context], [pages.tolist()], CPU)
        alone = ops.paged_attention(q[rows], only_k, only_v, alone_meta, scale=0.3, sliding_window=window)
        torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-5)


def test_pages_before_the_window_are_not_read():
    q, k_cache, v_cache, meta = random_case([1, 1, 6], [30, 26, 29])
    k_cache[meta.page_table[:, :3].flatten()] = float("nan")
    v_cache[meta.page_table[:, :3].flatten()] = float("nan")
    assert ops.paged_attention(q, k_cache, v_cache, meta, scale=0.3, sliding_window=12).isfinite().all()
    assert not ops.paged_attention(q, k_cache, v_cache, meta, scale=0.3, sliding_window=None).isfinite().any()


def test_metadata_is_built_with_decodes_in_front():
    meta = AttentionMetadata.build([1, 1, 4, 1], [5, 2, 4, 3], [[3, 1], [2], [7], [4]], CPU)
    assert meta.num_decode == 2 and meta.query_start == [0, 1, 2, 6, 7]
    assert meta.num_query == [1, 1, 4, 1] and meta.num_tokens == 7 and meta.max_context == 5
    assert meta.page_table.tolist() == [[3, 1], [2, 0], [7, 0], [4, 0]]
    nothing = AttentionMetadata.build([], [], [], CPU)
    assert (nothing.num_tokens, nothing.max_context, nothing.reads(BLOCK_SIZE, None)) == (0, 0, [])


def test_metadata_refuses_more_queries_than_keys():
    with pytest.raises(AssertionError):
        AttentionMetadata.build([3], [2], [[0]], CPU)


def test_store_kv_writes_the_slots_and_nothing_else():
    k_cache, v_cache = torch.zeros(2, 5, BLOCK_SIZE, 2, 3)
    slot = torch.randperm(5 * BLOCK_SIZE)[:7]
    k, v = torch.randn(2, 7, 2, 3)
    ops.store_kv(k, v, k_cache, v_cache, slot)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        for row, place in zip(rows, slot.tolist(), strict=True):
            assert torch.equal(cache[place // BLOCK_SIZE, place % BLOCK_SIZE], row)
        assert (cache.flatten(2).abs().sum(2) != 0).sum() == 7
