"""Shared by both attention kernels: the loop over a sequence's keys, its constants, and the checks of operands.

A key's numbers are one block, or a block and a smaller one for the rest, so that little of a head of 192 or 576 numbers
is padding. Rows of 8 bits (`kv_rows`) are widened to the dtype of the queries as they are loaded.

Shape suffixes: T tokens, H query heads, G key/value heads, d head size of keys, e of values, N pages, B tokens per
page, S sequences, X chunks; in the kernels M is a block of (token, head) pairs, C of keys, D and R are the first and
the rest of a key's numbers, E a value's numbers, P scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.kv_rows import KVScales
from moe_runtime.kernels.torch_attention import check_attention
from moe_runtime.kernels.torch_ops import check_contiguous
from moe_runtime.kernels.triton.rotary import check_heads
from moe_runtime.kernels.triton.tiles import Chip

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def load_part(
    ptr: tl.tensor,
    place_M: tl.tensor,
    is_row_M: tl.tensor,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Numbers `FIRST .. FIRST + BLOCK` of each row; zeros from `SIZE` on, and where there is no row."""
    d_D = tl.arange(0, BLOCK)
    is_x_MD = is_row_M[:, None]
    if FIRST + BLOCK > SIZE:
        is_x_MD = is_x_MD & (d_D < SIZE - FIRST)[None, :]
    return tl.load(ptr + FIRST + place_M[:, None] + d_D[None, :], mask=is_x_MD, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(
    ptr: tl.tensor,
    scale_ptr: tl.tensor,
    place_C: tl.tensor,
    scale_place_C: tl.tensor,
    is_row_C: tl.tensor,
    dtype: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
) -> tl.tensor:
    """As `load_part`. Rows of 8 bits are widened to `dtype`: int8, or E4M3 as uint8, times the row's scale; from number
    `SPLIT` on, unless it is 0, times its second one."""
    x_CD = load_part(ptr, place_C, is_row_C, FIRST, SIZE, BLOCK)
    if scale_ptr is not None:
        if x_CD.dtype == tl.uint8:
            # As float16 with the exponent's bias of E4M3, 8 less than its own.
            code_CD = x_CD.to(tl.uint16)
            half_CD = ((code_CD & 0x80) << 8 | (code_CD & 0x7F) << 7).to(tl.float16, bitcast=True)
            wide_CD = half_CD.to(tl.float32) * 256.0
        else:
            wide_CD = x_CD.to(tl.float32)
        scale_CD = tl.load(scale_ptr + scale_place_C, mask=is_row_C, other=0.0)[:, None]
        if SPLIT > 0 and SPLIT < FIRST + BLOCK:
            second_C = tl.load(scale_ptr + scale_place_C + 1, mask=is_row_C, other=0.0)
            is_first_CD = (FIRST + tl.arange(0, BLOCK) < SPLIT)[None, :]
            scale_CD = tl.where(is_first_CD, scale_CD, second_C[:, None])
        x_CD = (wide_CD * scale_CD).to(dtype)
    return x_CD


@triton.jit  # type: ignore[untyped-decorator]
def attend(
    q_MD: tl.tensor,
    q_MR: tl.tensor,
    position_M: tl.tensor,
    first_key: tl.tensor,
    end_key: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    table_ptr: tl.tensor,
    k_page_stride: tl.tensor,
    v_page_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    num_groups: tl.tensor,
    scale: tl.tensor,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
    REUSE_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Weighted sum of values, sum of weights and largest score (base 2) of each row, over keys `first .. end`.

    `q_MR` counts if `BLOCK_R` is not 0. With `REUSE_KEYS`, the first block of a key is its value. Without rows of 8
    bits, pointers to scales are `None`; a key has `SCALES` of them, the first of two for as many numbers as a value
    has."""
    SPLIT: tl.constexpr = VALUE_SIZE if SCALES == 2 else 0
    acc_ME = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    total_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    max_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    for start in range(first_key, end_key, BLOCK_C):
        key_C = start + tl.arange(0, BLOCK_C)
        is_key_C = key_C < end_key
        page_C = tl.load(table_ptr + key_C // PAGE, mask=is_key_C, other=0)
        in_page_C = key_C % PAGE * num_groups
        k_place_C = page_C * k_page_stride + in_page_C * HEAD_SIZE
        v_place_C = page_C * v_page_stride + in_page_C * VALUE_STRIDE
        scale_place_C = page_C * scale_page_stride + in_page_C * SCALES
        # After the last key, values belong to no sequence. They are read as zeros, because 0 times NaN is NaN.
        k_CD = load_rows(
            k_ptr, k_scale_ptr, k_place_C, scale_place_C, is_key_C, q_MD.dtype, 0, HEAD_SIZE, BLOCK_D, SPLIT
        )
        score_MC = tl.dot(q_MD, tl.trans(k_CD), input_precision="ieee")
        if BLOCK_R > 0:
            k_CR = load_rows(
                k_ptr, k_scale_ptr, k_place_C, scale_place_C, is_key_C, q_MD.dtype, BLOCK_D, HEAD_SIZE, BLOCK_R, SPLIT
            )
            score_MC = tl.dot(q_MR, tl.trans(k_CR), score_MC, input_precision="ieee")
        score_MC = score_MC * scale
        visible_MC = (key_C[None, :] <= position_M[:, None]) & is_key_C[None, :]
        if WINDOW > 0:
            visible_MC &= key_C[None, :] > position_M[:, None] - WINDOW
        score_MC = tl.where(visible_MC, score_MC, float("-inf"))

        new_max_M = tl.maximum(max_M, tl.max(score_MC, 1))
        finite_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)  # a row may see none of these keys
        weight_MC = tl.exp2(score_MC - finite_M[:, None])
        shrink_M = tl.exp2(max_M - finite_M)
        total_M = total_M * shrink_M + tl.sum(weight_MC, 1)
        v_CE = k_CD
        if not REUSE_KEYS:
            v_CE = load_rows(
                v_ptr, v_scale_ptr, v_place_C, scale_place_C, is_key_C, q_MD.dtype, 0, VALUE_SIZE, BLOCK_E, 0
            )
        acc_ME = tl.dot(weight_MC.to(v_CE.dtype), v_CE, acc_ME * shrink_M[:, None], input_precision="ieee")
        max_M = new_max_M
    return acc_ME, total_M, max_M


@triton.jit  # type: ignore[untyped-decorator]
def sink_weight(sink: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """The weight of sinks beside a largest score of base 2. The product is in float64, because in float32 the compiler
    may join it with the difference, which changes bits from one kernel to another."""
    score = (sink.to(tl.float64) * LOG2_E).to(tl.float32)
    return tl.exp2(tl.minimum(score - largest, 100.0))  # beside a weight of 2 ** 100 all others are nothing


@dataclass(frozen=True)
class HeadSizes:
    """Numbers of a head.

    Attributes:
        key: of a query and a key.
        value: of a value.
        in_keys: whether values are a view of the keys, the first numbers of each.
        scales: of a key of 8 bits; 0: the cache has the dtype of queries.
    """

    key: int
    value: int
    in_keys: bool = False
    scales: int = 0

    @property
    def key_blocks(self) -> tuple[int, int]:
        """Blocks, powers of two, for the first and the rest of a key's numbers; no rest if one block is as small."""
        whole = max(16, triton.next_power_of_2(self.key))
        first = whole // 2
        rest = max(16, triton.next_power_of_2(self.key - first))  # a tensor core takes at least 16 numbers
        return (first, rest) if first + rest < whole else (whole, 0)

    @property
    def value_block(self) -> int:
        """The block, a power of two, for a value's numbers."""
        block: int = max(16, triton.next_power_of_2(self.value))
        return block

    @property
    def widest(self) -> int:
        """The largest of these blocks."""
        return max(self.key_blocks[0], self.value_block)

    @property
    def has_large_widened_keys(self) -> bool:
        """Whether a block of keys that are widened in registers leaves room for few rows only."""
        return self.scales > 0 and self.widest > 256

    @property
    def most(self) -> int:
        """Numbers in blocks: of a key or of a value, whichever are more."""
        return max(sum(self.key_blocks), self.value_block)


def attention_meta(
    sizes: HeadSizes, page_size: int, sliding_window: int | None, itemsize: int, chip: Chip, *, rows: int, keys: int
) -> dict[str, int]:
    """Constants and launch options that both attention kernels share; `rows` (token, head) pairs and `keys` a step.
    `itemsize` is that of queries."""
    block_d, block_r = sizes.key_blocks
    large = rows * sizes.most > 64 * 128
    if sizes.scales:  # keys that are widened take registers too
        large = rows > 64 or (sizes.most > 64 and rows * sizes.most >= 32 * 128)
    num_stages = 3 if rows > 64 else 2
    if itemsize == 4:  # float32 is multiplied in registers
        keys, large, num_stages = 16, True, 3
    elif sizes.widest > 256:  # one program takes an SM; five stages give it two blocks of keys
        keys, num_stages = 32 if chip.has_new_mma else 16, 5
    elif sizes.widest > 128:
        keys = 32
    return {
        "WINDOW": sliding_window or 0,
        "PAGE": page_size,
        "HEAD_SIZE": sizes.key,
        "VALUE_SIZE": sizes.value,
        "VALUE_STRIDE": sizes.key if sizes.in_keys else sizes.value,
        "SCALES": sizes.scales,
        "REUSE_KEYS": sizes.in_keys and sizes.value == block_d,
        "BLOCK_M": rows,
        "BLOCK_C": keys,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "BLOCK_E": sizes.value_block,
        "num_warps": 8 if large else 4,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
    }


def check_operands(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGe: Tensor,
    sinks_H: Tensor | None,
    kv_scales: KVScales | None = None,
) -> tuple[int, HeadSizes]:
    """Refuse operands that do not fit together; returns the number of key/value heads and the numbers of a head.

    Raises:
        ValueError: the operand and what is allowed.
    """
    check_heads(q_THd=q_THd)
    check_attention(q_THd, k_cache_NBGd, v_cache_NBGe, sinks_H, kv_scales)
    check_contiguous(sinks_H=sinks_H)
    in_keys = v_cache_NBGe.data_ptr() == k_cache_NBGd.data_ptr() and v_cache_NBGe.stride() == k_cache_NBGd.stride()
    if not _has_whole_pages(k_cache_NBGd):
        raise ValueError(f"k_cache_NBGd: strides {k_cache_NBGd.stride()} are not allowed; pages must be contiguous")
    if not in_keys and not _has_whole_pages(v_cache_NBGe):
        raise ValueError(
            f"v_cache_NBGe: strides {v_cache_NBGe.stride()} are not allowed; pages must be contiguous, or the first "
            "numbers of each key of k_cache_NBGd"
        )
    scales = 0 if kv_scales is None else kv_scales.k_NBGP.shape[3]
    return k_cache_NBGd.shape[2], HeadSizes(k_cache_NBGd.shape[3], v_cache_NBGe.shape[3], in_keys, scales)


def _has_whole_pages(cache_NBGd: Tensor) -> bool:
    return cache_NBGd[:1].is_contiguous()


def cache_arguments(
    k_cache_NBGd: Tensor, v_cache_NBGe: Tensor, kv_scales: KVScales | None, page_table: Tensor
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Pointers of a cache, with the page table, and its strides, as both attention kernels take them.

    Raises:
        ValueError: scales are not as a page has them.
    """
    strides = (k_cache_NBGd.stride(0), v_cache_NBGe.stride(0))
    if kv_scales is None:
        return (k_cache_NBGd, v_cache_NBGe, None, None, page_table), (*strides, 0)
    k_scale, v_scale = kv_scales.k_NBGP, kv_scales.v_NBG1
    num_scales = k_scale.shape[3]
    for name, scale in (("k_NBGP", k_scale), ("v_NBG1", v_scale)):
        wanted = (k_scale.stride(0), k_scale.shape[2] * num_scales, num_scales)
        if scale.stride()[:3] != wanted or scale.stride(3) != 1:
            raise ValueError(f"kv_scales: {name} with strides {scale.stride()} is not allowed; it must be {wanted}")
    codes = (cache.view(torch.uint8) if cache.dtype != torch.int8 else cache for cache in (k_cache_NBGd, v_cache_NBGe))
    return (*codes, k_scale, v_scale, page_table), (*strides, k_scale.stride(0))
