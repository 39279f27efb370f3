"""Native attention over the paged cache: against the torch twin, and the same bits for any chunks of a prompt."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import DTYPES, assert_close, cache_and_meta, normal
from given_back import spoil

from moe_runtime.kernels import torch_attention
from moe_runtime.kernels.attention import AttentionMetadata

pytestmark = pytest.mark.usefixtures("threads")

# Queries, context and page numbers of each sequence.
STEPS = [
    ([1], [1]),
    ([5], [5]),
    ([1, 1, 1], [1, 64, 150]),
    ([1, 200, 70], [65, 200, 300]),
    ([40, 1], [333, 7]),
    ([1, 2, 30], [1300, 520, 1050]),  # more than a span
    ([1] * 9, [5, 64, 65, 511, 512, 513, 1100, 30, 129]),  # a task reads all heads
]


@DTYPES
@pytest.mark.parametrize("heads", [(4, 2, 64), (6, 1, 24), (3, 3, 17), (2, 1, 128), (2, 2, 80)])
@pytest.mark.parametrize(("num_query", "contexts"), STEPS)
@pytest.mark.parametrize("window", [None, 40])
def test_paged_attention(kernels, dtype, heads, num_query, contexts, window):
    num_heads, groups, head_size = heads
    k_cache, v_cache, meta, blocks = cache_and_meta(num_query, contexts, groups, head_size, dtype)
    q = normal(sum(num_query), num_heads, head_size, dtype=dtype)
    options = {"scale": head_size**-0.5, "sliding_window": window}
    expected = torch_attention.paged_attention(q, k_cache, v_cache, meta, **options)
    spoil(window, num_query, contexts, blocks, k_cache, v_cache)
    actual = kernels.paged_attention(q, k_cache, v_cache, meta, **options)
    # The softmax weights are rounded to bfloat16 as well, which the twin does for more than one query only.
    assert_close(actual, expected, scale=3)


@DTYPES
@pytest.mark.parametrize("window", [None, 50, 600])
@pytest.mark.parametrize(("length", "heads"), [(201, (6, 2, 32)), (1201, (8, 2, 64)), (1201, (3, 3, 17))])
def test_attention_has_the_same_bits_in_any_chunking_and_batch(kernels, dtype, window, length, heads):
    """Whole prompts, random chunks, one token at a time, with what lies behind in the cache already or not."""
    page, contexts, (num_heads, groups, head_size) = 8, [length, 130], heads
    k_cache, v_cache, _, blocks = cache_and_meta([1, 1], contexts, groups, head_size, dtype, page)
    queries = [normal(context, num_heads, head_size, dtype=dtype) for context in contexts]
    options = {"scale": 0.2, "sliding_window": window}

    def attend(parts):
        meta = AttentionMetadata.build(
            [end - start for _, start, end in parts],
            [end for _, _, end in parts],
            [blocks[sequence] for sequence, _, _ in parts],
            torch.device("cpu"),
        )
        q = torch.cat([queries[sequence][start:end] for sequence, start, end in parts])
        return kernels.paged_attention(q, k_cache, v_cache, meta, **options)

    kernels.set_threads(1)
    whole = attend([(0, 0, length)])
    kernels.set_threads(2)
    assert torch.equal(attend([(1, 0, 130), (0, 0, length)])[130:], whole)
    for position in {*range(0, length, 37), length - 1}:
        alone, company = [(0, position, position + 1)], [(1, 5, 6)] * int(torch.randint(1, 9, ()))
        assert torch.equal(attend(alone), whole[position : position + 1])
        assert torch.equal(attend(company + alone)[-1:], whole[position : position + 1])
    start = 0
    while start < length:
        end = min(length, start + int(torch.randint(1, 90, ())))
        assert torch.equal(attend([(0, start, end)]), whole[start:end])
        start = end
    # A query's result is a function of the keys that it sees: what comes later may change.
    for sequence_page in blocks[0][100 // page + 1 :]:
        k_cache[sequence_page], v_cache[sequence_page] = 7.0, -3.0
    assert torch.equal(attend([(0, 0, 100)]), whole[:100])
