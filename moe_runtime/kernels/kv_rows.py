"""Rows of 8 bits in the KV cache: how they are written and read. The slow twin of every kernel that does either.

A row is what one key/value head keeps of a token as its key or its value. It is quantised by itself, so it does not
depend on batches or chunks: symmetric int8 with the scale max / 127, or E4M3 with the scale max / 448. In latent
attention, the latent and the rotated key of a row have a scale each, since their sizes differ.

Shape suffixes: T tokens, G key/value heads, d numbers of a row, P parts of a row with a scale each, N pages, B tokens
per page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.kernels.quantized import quantize
from moe_runtime.types.weight_format import Code, Scale, WeightFormat

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_CODES = {torch.int8: Code.INT8, torch.float8_e4m3fn: Code.FP8}


@dataclass(frozen=True)
class KVScales:
    """Scales of the rows of a layer's cache, float32.

    Attributes:
        k_NBGP: of keys; with two parts, the first is as large as a value (latent attention).
        v_NBG1: of values.
    """

    k_NBGP: Tensor
    v_NBG1: Tensor


def is_quantized(cache_NBGd: Tensor) -> bool:
    """Whether rows of a cache have 8 bits."""
    return cache_NBGd.dtype in _CODES


def key_parts(key_size: int, value_size: int, scale_NBGP: Tensor) -> tuple[int, ...]:
    """Numbers of each part of a key."""
    return (key_size,) if scale_NBGP.shape[3] == 1 else (value_size, key_size - value_size)


def quantize_rows(x_TGd: Tensor, dtype: torch.dtype, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Codes `[T, G, d]` in int8 or float8_e4m3fn, and scales `[T, G, P]`."""
    format = WeightFormat(_CODES[dtype], Scale.FLOAT32)
    found = [quantize(part.flatten(0, 1), format) for part in x_TGd.split(list(parts), dim=2)]
    codes = torch.cat([each.codes for each in found], 1).view(dtype)
    scales = torch.cat([each.scales_NG for each in found], 1)
    return codes.view(x_TGd.shape), scales.view(*x_TGd.shape[:2], len(parts))


def widen_rows(codes: Tensor, scales: Tensor, parts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The rows `[.., d]` that codes `[.., d]` and scales `[.., P]` stand for: products in float32, then in `dtype`."""
    products = [part.float() * scales[..., i : i + 1] for i, part in enumerate(codes.split(list(parts), dim=-1))]
    return torch.cat(products, -1).to(dtype)


def store_quantized(
    x_TGd: Tensor, cache_NBGd: Tensor, scale_NBGP: Tensor, cache_position_T: Tensor, parts: tuple[int, ...]
) -> None:
    """Quantise each token's rows, and write codes and scales to its position in the cache, in place.

    Args:
        cache_NBGd: int8 or float8_e4m3fn.
        cache_position_T: int64, `page * block_size + offset`, all different.
        parts: numbers of each part of a row.
    """
    codes_TGd, scale_TGP = quantize_rows(x_TGd, cache_NBGd.dtype, parts)
    place = cache_position_T // cache_NBGd.shape[1], cache_position_T % cache_NBGd.shape[1]
    cache_NBGd.view(torch.uint8)[place] = codes_TGd.view(torch.uint8)
    scale_NBGP[place] = scale_TGP


def take_pages(
    cache_NBGd: Tensor, scale_NBGP: Tensor | None, pages: Tensor, parts: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The rows of some pages `[.., B, G, d]` in `dtype`."""
    if scale_NBGP is None:
        return cache_NBGd[pages]
    codes = cache_NBGd.view(torch.uint8)[pages].view(cache_NBGd.dtype)
    return widen_rows(codes, scale_NBGP[pages], parts, dtype)
