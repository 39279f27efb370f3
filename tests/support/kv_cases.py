"""Caches whose rows have 8 bits, and what their rows stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.kernels.kv_rows import DTYPES, KVScales, key_parts, quantize_rows, widen_rows


def quantize_cache(k_NBGd: Tensor, v_NBGe: Tensor, name: str) -> tuple[Tensor, Tensor, KVScales]:
    """Codes of keys and values, and their scales, in pages as `KVCache` has them; values that are the front of keys
    stay so."""
    in_keys = k_NBGd.data_ptr() == v_NBGe.data_ptr()
    key_size, value_size = k_NBGd.shape[3], v_NBGe.shape[3]
    k_codes, k_scale = _quantize(k_NBGd, name, (value_size, key_size - value_size) if in_keys else (key_size,))
    if in_keys:
        k_codes, k_scale = _in_pages(k_codes, k_scale)
        return k_codes, k_codes[..., :value_size], KVScales(k_scale, k_scale[..., :1])
    v_codes, v_scale = _quantize(v_NBGe, name, (value_size,))
    k_codes, v_codes, k_scale, v_scale = _in_pages(k_codes, v_codes, k_scale, v_scale)
    return k_codes, v_codes, KVScales(k_scale, v_scale)


def _quantize(rows_NBGd: Tensor, name: str, parts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    codes, scales = quantize_rows(rows_NBGd.flatten(0, 1), DTYPES[name], parts)
    return codes.view(rows_NBGd.shape), scales.view(*rows_NBGd.shape[:3], -1)


def _in_pages(*parts: Tensor) -> list[Tensor]:
    """The parts, with those of a page side by side."""
    bytes_of_page = [part[0].nbytes for part in parts]
    pages = torch.empty(len(parts[0]), sum(bytes_of_page), dtype=torch.uint8, device=parts[0].device)
    found = []
    for part, of_page in zip(parts, pages.split(bytes_of_page, dim=1), strict=True):
        of_page.copy_(part.flatten(1).view(torch.uint8))
        found.append(of_page.view(part.dtype).view(part.shape))
    return found


def widen_cache(k_codes: Tensor, v_codes: Tensor, scales: KVScales, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The keys and values that codes stand for, as attention reads them."""
    key_size, value_size = k_codes.shape[3], v_codes.shape[3]
    keys = widen_rows(k_codes, scales.k_NBGP, key_parts(key_size, value_size, scales.k_NBGP), dtype)
    if k_codes.data_ptr() == v_codes.data_ptr():
        return keys, keys[..., :value_size]
    return keys, widen_rows(v_codes, scales.v_NBG1, (value_size,), dtype)
