"""A layer's KV cache as the native library takes it; see `kv_pages.h`. Shapes are those of `native`."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.kernels.cpu.structs import CachedRows, KVPages
from moe_runtime.kernels.kv_rows import KVScales

CODES = {torch.float32: 0, torch.bfloat16: 0, torch.int8: 1, torch.float8_e4m3fn: 2}  # `RowCode` of kv_pages.h


def kv_pages(k_cache_NBGd: Tensor, v_cache_NBGe: Tensor, kv_scales: KVScales | None = None) -> KVPages:
    """The struct of a cache, which it keeps alive.

    Args:
        v_cache_NBGe: may be the front of the keys.
        kv_scales: of a cache whose rows have 8 bits.
    """
    assert k_cache_NBGd.dtype == v_cache_NBGe.dtype and k_cache_NBGd.shape[:3] == v_cache_NBGe.shape[:3]
    code = CODES[k_cache_NBGd.dtype]
    assert (kv_scales is not None) == (code > 0)
    k_scale, v_scale = (None, None) if kv_scales is None else (kv_scales.k_NBGP, kv_scales.v_NBG1)
    split = v_cache_NBGe.shape[3] if k_scale is not None and k_scale.shape[3] == 2 else 0
    assert not split or k_cache_NBGd.shape[2] == 1
    keys, values = _rows(k_cache_NBGd, k_scale), _rows(v_cache_NBGe, v_scale)
    found = KVPages(keys, values, k_cache_NBGd.shape[1], code, k_cache_NBGd.itemsize, split)
    found.keep = (k_cache_NBGd, v_cache_NBGe, kv_scales)
    return found


def _rows(cache_NBGd: Tensor, scale_NBGP: Tensor | None) -> CachedRows:
    _, _, groups, size = cache_NBGd.shape
    page, token, head, number = cache_NBGd.stride()
    assert number == 1 and (head == size or groups == 1)
    itemsize = cache_NBGd.itemsize
    rows = CachedRows(cache_NBGd.data_ptr(), None, page * itemsize, token * itemsize)
    if scale_NBGP is not None:
        assert scale_NBGP.dtype == torch.float32 and scale_NBGP.shape[:3] == cache_NBGd.shape[:3]
        assert groups == 1 or scale_NBGP.stride(2) == 1
        rows.scales, rows.page_scales, rows.token_scales = scale_NBGP.data_ptr(), *scale_NBGP.stride()[:2]
    return rows
