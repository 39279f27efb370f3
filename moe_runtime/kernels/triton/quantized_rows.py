"""Writes rows of 8 bits into the paged cache. Quantises as `kv_rows` does, with the same bits.

A program has one token with all its heads. Heads may be inside a projection's output; only a head's own values must be
contiguous.

Shape suffixes: T tokens, G key/value heads, d numbers of a row, N pages, B tokens per page, P scales of a row; in the
kernel G is a block of heads, D a block of numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
ROUND_TO_INT = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it has no digits after the point


@triton.jit  # type: ignore[untyped-decorator]
def to_e4m3(x: tl.tensor) -> tl.tensor:
    """The bits of the nearest E4M3 as uint8, ties to even; `|x|` is at most 448."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # A float32 of that size has steps of 2^-9, as small codes have.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    return (tl.where(tl.abs(x) < 0.015625, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit  # type: ignore[untyped-decorator]
def store_quantized_kernel(
    x_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    position_ptr: tl.tensor,
    x_token_stride: tl.tensor,
    x_head_stride: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    page_scales: tl.tensor,
    token_scales: tl.tensor,
    head_scales: tl.tensor,
    num_heads: tl.tensor,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Quantise a token's rows, or one part of each, and write codes and scales to its position."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token)
    page, in_page = position // PAGE, position % PAGE
    head_G = tl.arange(0, BLOCK_G)
    d_D = tl.arange(0, BLOCK_D)
    is_head_G = head_G < num_heads
    is_x_GD = is_head_G[:, None] & (d_D < SIZE)[None, :]
    from_GD = x_ptr + token * x_token_stride + head_G[:, None] * x_head_stride + d_D[None, :]
    x_GD = tl.load(from_GD, mask=is_x_GD, other=0.0).to(tl.float32)
    # A product of zero and what is not finite is NaN, which the largest number need not be.
    scale_G = tl.div_rn(tl.max(tl.abs(x_GD), 1), LARGEST) + tl.sum(x_GD * 0.0, 1)
    inverse_G = tl.minimum(tl.div_rn(1.0, tl.where(scale_G > 0, scale_G, 1.0)), LARGEST_FLOAT)
    x_GD = tl.minimum(tl.maximum(x_GD * inverse_G[:, None], -LARGEST), LARGEST)
    if cache_ptr.dtype.element_ty == tl.int8:
        codes_GD = ((x_GD + ROUND_TO_INT) - ROUND_TO_INT).to(tl.int8)
    else:
        codes_GD = to_e4m3(x_GD)
    to_GD = cache_ptr + page * page_stride + in_page * token_stride + head_G[:, None] * head_stride + d_D[None, :]
    tl.store(to_GD, codes_GD, mask=is_x_GD)
    tl.store(scale_ptr + page * page_scales + in_page * token_scales + head_G * head_scales, scale_G, mask=is_head_G)


def store_quantized_meta(num_heads: int, size: int, page_size: int, dtype: torch.dtype) -> dict[str, int | float]:
    """Constants and launch options of `store_quantized_kernel`, for a cache of this dtype."""
    return {
        "PAGE": page_size,
        "SIZE": size,
        "LARGEST": 127.0 if dtype == torch.int8 else 448.0,
        "BLOCK_G": triton.next_power_of_2(num_heads),
        "BLOCK_D": triton.next_power_of_2(size),
        "enable_fp_fusion": False,
    }


def store_quantized(
    x_TGd: Tensor, cache_NBGd: Tensor, scale_NBGP: Tensor, cache_position_T: Tensor, parts: tuple[int, ...]
) -> None:
    """The Triton form of `kv_rows.store_quantized`, same arguments and effect.

    Raises:
        ValueError: operands do not fit together.
    """
    num_tokens, num_heads, size = x_TGd.shape
    if num_tokens and x_TGd.stride(2) != 1:
        raise ValueError(f"x_TGd: strides {x_TGd.stride()} are not allowed; the last of them must be 1")
    if cache_NBGd.shape[2:] != x_TGd.shape[1:] or cache_NBGd.stride(3) != 1 or sum(parts) != size:
        raise ValueError(
            f"cache_NBGd: {tuple(cache_NBGd.shape)} in parts of {parts} does not fit x_TGd {tuple(x_TGd.shape)}"
        )
    if scale_NBGP.shape != (*cache_NBGd.shape[:3], len(parts)) or scale_NBGP.dtype != torch.float32:
        raise ValueError(
            f"scale_NBGP: {scale_NBGP.dtype} {tuple(scale_NBGP.shape)} is not allowed; it must be float32 "
            f"{(*cache_NBGd.shape[:3], len(parts))}"
        )
    if cache_position_T.shape != x_TGd.shape[:1] or cache_position_T.dtype != torch.int64:
        raise ValueError(
            f"cache_position_T: {cache_position_T.dtype} {tuple(cache_position_T.shape)} is not allowed; "
            f"cache positions must be int64, one for each of {num_tokens} tokens"
        )
    if num_tokens == 0:
        return
    codes = cache_NBGd if cache_NBGd.dtype == torch.int8 else cache_NBGd.view(torch.uint8)
    first = 0
    for index, count in enumerate(parts):
        scales = scale_NBGP[..., index]
        store_quantized_kernel[(num_tokens,)](
            x_TGd[..., first:],
            codes[..., first:],
            scales,
            cache_position_T,
            *x_TGd.stride()[:2],
            *codes.stride()[:3],
            *scales.stride(),
            num_heads,
            **store_quantized_meta(num_heads, count, cache_NBGd.shape[1], cache_NBGd.dtype),
        )
        first += count
