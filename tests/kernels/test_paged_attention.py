from types import SimpleNamespace

import pytest
import torch

from moe_runtime.kernels import ops, reference
from moe_runtime.kernels.ops import AttentionMetadata

CPU = torch.device("cpu")
BLOCK_SIZE = 4


def random_case(
    num_query, context_len, *, heads=6, groups=2, head_size=8, value_size=8, in_keys=False, dtype=torch.float32
):
    """Queries, caches and metadata of sequences whose pages lie scattered in the cache."""
    num_pages = [-(-context // BLOCK_SIZE) for context in context_len]
    pages = torch.randperm(sum(num_pages) + 3).tolist()
    blocks = [[pages.pop() for _ in range(count)] for count in num_pages]
    meta = AttentionMetadata.build(num_query, context_len, blocks, CPU)
    pages = (sum(num_pages) + 3, BLOCK_SIZE, groups)
    k_cache = torch.randn(*pages, head_size).to(dtype)
    v_cache = k_cache[..., :value_size] if in_keys else torch.randn(*pages, value_size).to(dtype)
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
# Heads of different kinds: their number and sizes, and whether values are a view of the keys.
KINDS = {
    "equal": {},
    "smaller values": {"head_size": 24, "value_size": 16},
    "larger values": {"head_size": 8, "value_size": 20},
    "values in keys": {"groups": 1, "head_size": 24, "value_size": 16, "in_keys": True},
}
SINKS = pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])


def options_of(window, heads, with_sinks):
    """Options of both forms; sinks as large as scores, so that they count."""
    return {"scale": 0.3, "sliding_window": window, "sinks_H": torch.randn(heads) * 2 if with_sinks else None}


@SINKS
@pytest.mark.parametrize("window", [None, 1, 3, 4, 9, 100])
@pytest.mark.parametrize("step", STEPS)
def test_equals_the_reference(step, window, with_sinks):
    case = random_case(*STEPS[step])
    options = options_of(window, 6, with_sinks)
    actual = ops.paged_attention(*case, **options)
    torch.testing.assert_close(actual, reference.paged_attention(*case, **options), rtol=1e-5, atol=1e-5)


@SINKS
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (8, 1), (12, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_dtypes(kind, heads, groups, dtype, with_sinks):
    case = random_case(*STEPS["mixed"], **{"heads": heads, "groups": groups, "dtype": dtype} | KINDS[kind])
    options = options_of(7, heads, with_sinks)
    actual, expected = ops.paged_attention(*case, **options), reference.paged_attention(*case, **options)
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@SINKS
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_decode_attention_gives_what_paged_attention_gives(kind, window, with_sinks):
    q, k_cache, v_cache, meta = random_case(*STEPS["mixed"], **KINDS[kind])
    options = options_of(window, 6, with_sinks)
    places = (meta.page_table, meta.on_device.sequence_T, meta.on_device.position_T)
    actual = ops.decode_attention(q, k_cache, v_cache, *places, max_context=12, **options)
    expected = reference.paged_attention(q, k_cache, v_cache, meta, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [ops, reference], ids=lambda module: module.__name__)
def test_sinks_are_those_of_transformers(form):
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k_cache, v_cache, meta = random_case([11], [11])
    sinks = torch.randn(6) * 2
    k, v = (cache[meta.page_table[0]].flatten(0, 1)[:11].transpose(0, 1)[None] for cache in (k_cache, v_cache))
    module = SimpleNamespace(num_key_value_groups=3, sinks=sinks, training=False)
    mask = torch.full((11, 11), float("-inf")).triu(1)[None, None]
    expected, _ = eager_attention_forward(module, q.transpose(0, 1)[None], k, v, mask, 0.3)
    actual = form.paged_attention(q, k_cache, v_cache, meta, scale=0.3, sliding_window=None, sinks_H=sinks)
    torch.testing.assert_close(actual, expected[0], rtol=1e-5, atol=1e-5)


def test_a_sink_above_all_scores_takes_all_weight():
    case = random_case(*STEPS["mixed"])
    sinks = torch.tensor([500.0, -500, 500, -500, 500, -500])
    actual = ops.paged_attention(*case, scale=0.3, sliding_window=None, sinks_H=sinks)
    without = ops.paged_attention(*case, scale=0.3, sliding_window=None)
    assert not actual[:, ::2].any()
    torch.testing.assert_close(actual[:, 1::2], without[:, 1::2], rtol=1e-5, atol=1e-5)


@SINKS
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_decodes_give_what_the_whole_prompt_gives(kind, window, with_sinks):
    q, k_cache, v_cache, whole = random_case([13], [13], **KINDS[kind])
    blocks = [whole.page_table[0].tolist()]
    options = options_of(window, 6, with_sinks)
    expected = ops.paged_attention(q, k_cache, v_cache, whole, **options)
    start = 0
    for size in (4, 3, 1, 1, 4):
        meta = AttentionMetadata.build([size], [start + size], blocks, CPU)
        rows = q[start : start + size]
        part = ops.paged_attention(rows, k_cache, v_cache, meta, **options)
        torch.testing.assert_close(part, expected[start : start + size], rtol=1e-5, atol=1e-5)
        start += size
    assert start == 13


@SINKS
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_does_not_see_its_neighbours(kind, window, with_sinks):
    q, k_cache, v_cache, meta = random_case(*STEPS["mixed"], **KINDS[kind])
    options = options_of(window, 6, with_sinks)
    together = ops.paged_attention(q, k_cache, v_cache, meta, **options)
    for i, context in enumerate(meta.context_len):
        rows = slice(meta.query_start[i], meta.query_start[i + 1])
        pages = meta.page_table[i, : -(-context // BLOCK_SIZE)]
        only_k, only_v = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
        only_k[pages], only_v[pages] = k_cache[pages], v_cache[pages]
        alone_meta = AttentionMetadata.build([meta.num_query[i]], [context], [pages.tolist()], CPU)
        alone = ops.paged_attention(q[rows], only_k, only_v, alone_meta, **options)
        torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-5)


def test_pages_before_the_window_are_not_read():
    q, k_cache, v_cache, meta = random_case([1, 1, 6], [30, 26, 29])
    k_cache[meta.page_table[:, :3].flatten()] = float("nan")
    v_cache[meta.page_table[:, :3].flatten()] = float("nan")
    assert ops.paged_attention(q, k_cache, v_cache, meta, scale=0.3, sliding_window=12).isfinite().all()
    assert not ops.paged_attention(q, k_cache, v_cache, meta, scale=0.3, sliding_window=None).isfinite().any()


def test_unfit_operands_are_refused_by_name():
    q, k_cache, v_cache, meta = random_case(*STEPS["decodes"])
    places = (meta.page_table, meta.on_device.sequence_T, meta.on_device.position_T)
    right = {"q_THd": q, "k_cache_NBGd": k_cache, "v_cache_NBGe": v_cache, "sinks_H": None}
    for name, wrong, message in (
        ("q_THd", q[:, :5], "shape"),
        ("q_THd", q[..., :7], "shape"),
        ("k_cache_NBGd", k_cache.double(), "float64 is not allowed"),
        ("v_cache_NBGe", v_cache[:, :, :1], "only the last number may differ"),
        ("v_cache_NBGe", v_cache[1:], "only the last number may differ"),
        ("v_cache_NBGe", v_cache.half(), "float16 is not allowed"),
        ("sinks_H", torch.randn(5), "must be float32 of 6 query heads"),
        ("sinks_H", torch.randn(6).half(), "must be float32 of 6 query heads"),
    ):
        *caches, sinks = (right | {name: wrong}).values()
        options = {"scale": 0.3, "sliding_window": None, "sinks_H": sinks}
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            ops.paged_attention(*caches, meta, **options)
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            ops.decode_attention(*caches, *places, max_context=13, **options)


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
