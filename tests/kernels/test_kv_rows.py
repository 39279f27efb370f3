"""Rows of 8 bits in the KV cache: the twins by hand, and attention in torch over them."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import cache_and_meta
from kv_cases import quantize_cache, widen_cache

from moe_runtime.kernels import invariant_ops, ops, reference
from moe_runtime.kernels.kv_rows import DTYPES, KVScales, quantize_rows, widen_rows

NAMES = pytest.mark.parametrize("name", DTYPES)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_near_what_was_stored(name: str, dtype: torch.dtype) -> None:
    x = (torch.randn(50, 3, 24) * torch.logspace(-6, 6, 150).view(50, 3, 1)).to(dtype)
    codes, scales = quantize_rows(x, DTYPES[name], (16, 8))
    assert codes.shape == x.shape and codes.dtype == DTYPES[name] and scales.shape == (50, 3, 2)
    found = widen_rows(codes, scales, (16, 8), dtype)
    for part, wide, scale in zip(x.split((16, 8), 2), found.split((16, 8), 2), scales.split(1, 2), strict=True):
        largest = part.float().abs().amax(2, keepdim=True)
        torch.testing.assert_close(scale, largest / (127 if name == "int8" else 448), rtol=1e-6, atol=0)
        # int8: half a step. E4M3: half of the last of 3 bits, or of the smallest step; and the rounding to the dtype.
        allowed = scale / 2 if name == "int8" else torch.maximum(part.float().abs() / 16, scale * 2**-10)
        assert (
            (wide.float() - part.float()).abs() <= allowed * 1.001 + largest * 2**-8 * (dtype != x.float().dtype)
        ).all()


@NAMES
def test_a_row_is_quantised_by_itself(name: str) -> None:
    x = torch.randn(9, 2, 16)
    codes, scales = quantize_rows(x, DTYPES[name], (16,))
    for row in range(9):
        alone = quantize_rows(x[row : row + 1], DTYPES[name], (16,))
        assert torch.equal(alone[0].view(torch.uint8), codes[row : row + 1].view(torch.uint8))
        assert torch.equal(alone[1], scales[row : row + 1])


@NAMES
def test_a_row_of_zeros_and_a_row_that_is_not_finite(name: str) -> None:
    x = torch.randn(4, 1, 8)
    x[0], x[1, 0, 3], x[2, 0, 0] = 0, float("nan"), float("inf")
    found = widen_rows(*quantize_rows(x, DTYPES[name], (8,)), (8,), torch.float32)
    assert not found[0].any() and found[1:3].isnan().all() and found[3].isfinite().all()


def random_case(groups: int = 2, key_size: int = 8, value_size: int = 8):
    """Queries, caches and metadata of decode rows and chunks; smaller values are the front of keys."""
    num_query = [1, 1, 3, 7, 2]
    k, v, meta, _ = cache_and_meta(num_query, [9, 2, 3, 12, 10], groups, key_size, torch.float32, page=4)
    q = torch.randn(sum(num_query), 6, key_size)
    return q, k, v if key_size == value_size else k[..., :value_size], meta


@NAMES
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("sizes", [(2, 8, 8), (1, 24, 16)])
def test_attention_reads_what_the_rows_stand_for(sizes: tuple[int, int, int], window: int | None, name: str) -> None:
    q, k, v, meta = random_case(*sizes)
    options = {"scale": 0.3, "sliding_window": window, "sinks_H": None if window else torch.randn(6)}
    *codes, scales = quantize_cache(k, v, name)
    wide = widen_cache(*codes, scales, q.dtype)
    places = (meta.page_table, meta.on_device.sequence_T, meta.on_device.position_T)
    for form, more in ((ops.paged_attention, (meta,)), (invariant_ops.paged_attention, (meta,))):
        assert torch.equal(form(q, *codes, *more, **options, kv_scales=scales), form(q, *wide, *more, **options))
    decode = [
        ops.decode_attention(q, *caches, *places, max_context=12, **options, kv_scales=given)
        for caches, given in ((codes, scales), (wide, None))
    ]
    assert torch.equal(*decode)
    slow = reference.paged_attention(q, *codes, meta, **options, kv_scales=scales)
    torch.testing.assert_close(decode[0], slow, rtol=1e-5, atol=1e-5)


@NAMES
@pytest.mark.parametrize("turned", [None, 6])
def test_keys_and_values_reach_their_positions_and_no_others(name: str, turned: int | None) -> None:
    k, v, cos, sin = torch.randn(7, 2, 12), torch.randn(7, 2, 12), *torch.randn(2, 7, turned or 2)
    caches = torch.zeros(2, 5, 4, 2, 12).to(DTYPES[name])
    scales = KVScales(*torch.zeros(2, 5, 4, 2, 1))
    position = torch.randperm(5 * 4)[:7]
    if turned:
        q, turned_k = ops.apply_rotary(torch.randn(7, 4, 12), k, cos, sin)
        ops.rotary_store_kv(q, k, v, cos, sin, *caches, position, scales)
        k = turned_k
    else:
        ops.store_kv(k, v, *caches, position, scales)
    places = position // 4, position % 4
    for cache, scale, rows in ((caches[0], scales.k_NBGP, k), (caches[1], scales.v_NBG1, v)):
        codes, expected = quantize_rows(rows, DTYPES[name], (12,))
        assert torch.equal(cache.view(torch.uint8)[places], codes.view(torch.uint8))
        assert torch.equal(scale[places], expected)
        assert int(scale.count_nonzero()) == 7 * 2 and int(cache.view(torch.uint8).flatten(2).any(2).sum()) == 7


def test_unfit_scales_are_refused_by_name() -> None:
    q, k, v, meta = random_case()
    k_codes, v_codes, scales = quantize_cache(k, v, "int8")
    options = {"scale": 0.3, "sliding_window": None}
    for caches, wrong, message in (
        ((k, v), scales, r"caches of .*float32.* are not allowed; both must be int8, or both float8_e4m3fn$"),
        ((k_codes, v_codes.view(torch.float8_e4m3fn)), scales, "caches of .* are not allowed"),
        (
            (k_codes, v_codes),
            KVScales(scales.k_NBGP[1:], scales.v_NBG1),
            r"k_NBGP .* is not allowed; it must be float32",
        ),
        ((k_codes, v_codes), KVScales(scales.k_NBGP, scales.v_NBG1.half()), "v_NBG1 .* is not allowed"),
    ):
        with pytest.raises(ValueError, match=f"^kv_scales: {message}"):
            ops.paged_attention(q, *caches, meta, **options, kv_scales=wrong)
    with pytest.raises(
        ValueError, match=r"^k_cache_NBGd: torch.int8 is not allowed; it must be torch.float32 as q_THd$"
    ):
        ops.paged_attention(q, k_codes, v_codes, meta, **options)
