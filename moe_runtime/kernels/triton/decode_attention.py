"""Attention of single rows, split over their keys: for decode, and for all rows if results must be batch-invariant.

The keys of a sequence are cut at fixed positions, every `CHUNK` keys from its beginning. Each program attends from all
heads of a group, or a block of them if they are many, to one chunk, and a second kernel merges the chunks in order. A
row's result depends on its own keys alone, bit for bit, whatever else is in the batch. Softmax is in float32.

Shape suffixes: as in `attend`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.kv_rows import KVScales
from moe_runtime.kernels.torch_ops import check_contiguous
from moe_runtime.kernels.triton.attend import (
    HeadSizes,
    attend,
    attention_meta,
    cache_arguments,
    check_operands,
    load_part,
    sink_weight,
)
from moe_runtime.kernels.triton.tiles import Chip, chip_of

CHUNK = 256
CHUNKS_TOGETHER = 16
MOST_SUMS = 1 << 26  # float32 numbers that are written at a time and merged, 256 MiB; more rows take turns


@triton.jit  # type: ignore[untyped-decorator]
def first_chunk_of(position: tl.tensor, WINDOW: tl.constexpr, CHUNK_SIZE: tl.constexpr) -> tl.tensor:
    """The chunk of the first key that the query at a position may see."""
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(position - (WINDOW - 1), 0)
    return first_key // CHUNK_SIZE


@triton.jit  # type: ignore[untyped-decorator]
def decode_attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    table_ptr: tl.tensor,
    sequence_ptr: tl.tensor,
    position_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    part_ptr: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    k_page_stride: tl.tensor,
    v_page_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    num_groups: tl.tensor,
    heads_per_group: tl.tensor,
    num_chunks: tl.tensor,
    scale: tl.tensor,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
    REUSE_KEYS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """One row, a block of heads of one group, one chunk of keys. With one chunk the result is final and `part_ptr` is
    `None`. Else `out_ptr` gets sums not yet divided, `part_ptr` gets each chunk's sum of weights and largest score, and
    `sinks_ptr` is `None`, as it is without sinks."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) // HEAD_BLOCKS
    position = tl.load(position_ptr + token).to(tl.int32)
    chunk = first_chunk_of(position, WINDOW, CHUNK_SIZE) + tl.program_id(2)
    first_key = chunk * CHUNK_SIZE
    end_key = tl.minimum(first_key + CHUNK_SIZE, position + 1)
    if first_key >= end_key:
        return

    head_M = tl.program_id(1) % HEAD_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    is_head_M = head_M < heads_per_group
    head_M += group * heads_per_group
    q_place_M = token * q_token_stride + head_M * q_head_stride
    q_MD = load_part(q_ptr, q_place_M, is_head_M, 0, HEAD_SIZE, BLOCK_D)
    q_MR = q_MD
    if BLOCK_R > 0:
        q_MR = load_part(q_ptr, q_place_M, is_head_M, BLOCK_D, HEAD_SIZE, BLOCK_R)
    table_ptr += tl.load(sequence_ptr + token).to(tl.int64) * table_stride
    if SCALES > 0:  # otherwise pointers to scales are None
        k_scale_ptr += group * SCALES
        v_scale_ptr += group * SCALES
    acc_ME, total_M, max_M = attend(
        q_MD, q_MR, tl.zeros((BLOCK_M,), dtype=tl.int32) + position, first_key, end_key,
        k_ptr + group * HEAD_SIZE, v_ptr + group * VALUE_STRIDE, k_scale_ptr, v_scale_ptr, table_ptr,
        k_page_stride, v_page_stride, scale_page_stride, num_groups, scale,
        WINDOW, PAGE, HEAD_SIZE, VALUE_SIZE, VALUE_STRIDE, SCALES, REUSE_KEYS,
        BLOCK_M, BLOCK_C, BLOCK_D, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    row_M = (token * num_groups * heads_per_group + head_M) * num_chunks + tl.program_id(2)
    if part_ptr is None:
        if sinks_ptr is not None:
            sink_M = tl.load(sinks_ptr + head_M, mask=is_head_M, other=float("-inf"))
            total_M += sink_weight(sink_M, max_M)
        acc_ME = acc_ME / total_M[:, None]
    else:
        tl.store(part_ptr + row_M * 2, total_M, mask=is_head_M)
        tl.store(part_ptr + row_M * 2 + 1, max_M, mask=is_head_M)
    e_E = tl.arange(0, BLOCK_E)
    is_out_ME = is_head_M[:, None] & (e_E < VALUE_SIZE)[None, :]
    tl.store(out_ptr + row_M[:, None] * VALUE_SIZE + e_E[None, :], acc_ME.to(out_ptr.dtype.element_ty), mask=is_out_ME)


@triton.jit  # type: ignore[untyped-decorator]
def merge_chunks_kernel(
    sum_ptr: tl.tensor,
    part_ptr: tl.tensor,
    position_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_chunks: tl.tensor,
    WINDOW: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Sums of one row and head over its chunks, in order, divided at the end by the weights and the sink's, if any."""
    token = tl.program_id(0).to(tl.int64)
    row = token * tl.num_programs(1) + tl.program_id(1)
    position = tl.load(position_ptr + token).to(tl.int32)
    used = position // CHUNK_SIZE + 1 - first_chunk_of(position, WINDOW, CHUNK_SIZE)
    e_E = tl.arange(0, BLOCK_E)
    acc_E = tl.zeros((BLOCK_E,), dtype=tl.float32)
    total = 0.0
    largest = float("-inf")
    for start in range(0, used, BLOCK_X):
        chunk_X = start + tl.arange(0, BLOCK_X)
        is_used_X = chunk_X < used
        place_X = row * num_chunks + chunk_X
        total_X = tl.load(part_ptr + place_X * 2, mask=is_used_X, other=0.0)
        max_X = tl.load(part_ptr + place_X * 2 + 1, mask=is_used_X, other=float("-inf"))
        is_sum_XE = is_used_X[:, None] & (e_E < VALUE_SIZE)[None, :]
        sum_XE = tl.load(sum_ptr + place_X[:, None] * VALUE_SIZE + e_E[None, :], mask=is_sum_XE, other=0.0)
        new_largest = tl.maximum(largest, tl.max(max_X))
        share_X = tl.exp2(max_X - new_largest)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(total_X * share_X)
        acc_E = acc_E * shrink + tl.sum(sum_XE * share_X[:, None], 0)
        largest = new_largest
    if sinks_ptr is not None:
        total += sink_weight(tl.load(sinks_ptr + tl.program_id(1)), largest)
    tl.store(out_ptr + row * VALUE_SIZE + e_E, (acc_E / total).to(out_ptr.dtype.element_ty), mask=e_E < VALUE_SIZE)


def decode_attention_meta(
    sizes: HeadSizes, page_size: int, sliding_window: int | None, itemsize: int, heads_per_group: int, chip: Chip
) -> dict[str, int]:
    """Constants and launch options of `decode_attention_kernel`."""
    most_rows = 16 if itemsize == 4 or sizes.has_large_widened_keys else 64 if sizes.most <= 64 else 32
    rows = min(max(16, triton.next_power_of_2(heads_per_group)), most_rows)  # a tensor core takes at least 16 rows
    return attention_meta(sizes, page_size, sliding_window, itemsize, chip, rows=rows, keys=64) | {
        "CHUNK_SIZE": CHUNK,
        "HEAD_BLOCKS": triton.cdiv(heads_per_group, rows),
    }


def merge_chunks_meta(value_size: int, sliding_window: int | None) -> dict[str, int]:
    """Constants and launch options of `merge_chunks_kernel`."""
    return {
        "WINDOW": sliding_window or 0,
        "CHUNK_SIZE": CHUNK,
        "VALUE_SIZE": value_size,
        "BLOCK_X": CHUNKS_TOGETHER,
        "BLOCK_E": triton.next_power_of_2(value_size),
        "enable_fp_fusion": False,
    }


def max_chunks(max_context: int, sliding_window: int | None) -> int:
    """The most chunks whose keys a row may see."""
    num_chunks = -(-max_context // CHUNK)
    if sliding_window is None:
        return num_chunks
    return min(num_chunks, (sliding_window - 2) // CHUNK + 2)  # the window may begin in the middle of a chunk


def _memory_of_chunks(
    num_tokens: int, num_heads: int, num_chunks: int, value_size: int, device: torch.device
) -> tuple[int, Tensor | None, Tensor | None]:
    """How many rows one launch takes, and memory for the sums and parts of their chunks; None for a single chunk."""
    if num_chunks == 1:
        return num_tokens, None, None
    most_rows = MOST_SUMS // (num_heads * num_chunks * value_size) // 4 * 4  # fours keep pointers aligned
    rows = min(num_tokens, max(4, most_rows))
    sums = torch.empty(rows, num_heads, num_chunks, value_size, device=device)
    return rows, sums, torch.empty(rows, num_heads, num_chunks, 2, device=device)


def decode_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGe: Tensor,
    page_table: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    *,
    max_context: int,
    scale: float,
    sliding_window: int | None,
    sinks_H: Tensor | None = None,
    kv_scales: KVScales | None = None,
    out_THe: Tensor | None = None,
) -> Tensor:
    """Attention of rows of any sequence and position; all values that depend on the step are on the device.

    A row's result depends on its own keys alone, bit for bit. The launches depend on the number of rows and
    `max_context` alone, so they can be captured once for the longest context.

    Args:
        q_THd: `[T, H, d]`.
        v_cache_NBGe, sinks_H, kv_scales: as in `paged_attention`.
        page_table: int64 `[S, max_pages]`, pages of each sequence.
        sequence_T: int32 or int64, which row of the page table each token uses.
        position_T: int32 or int64; a row sees the keys up to its own position.
        max_context: at least the largest position plus one.
        out_THe: contiguous; default a new one.

    Returns:
        `[T, H, e]` in the dtype of `q_THd`.

    Raises:
        ValueError: operands do not fit together.
    """
    num_groups, sizes = check_operands(q_THd, k_cache_NBGd, v_cache_NBGe, sinks_H, kv_scales)
    check_contiguous(sequence_T=sequence_T, position_T=position_T, out_THe=out_THe)
    num_tokens, num_heads, _ = q_THd.shape
    if out_THe is None:
        out_THe = torch.empty(num_tokens, num_heads, sizes.value, dtype=q_THd.dtype, device=q_THd.device)
    if num_tokens == 0:
        return out_THe
    num_chunks = max_chunks(max_context, sliding_window)
    rows_at_once, sums, part = _memory_of_chunks(num_tokens, num_heads, num_chunks, sizes.value, q_THd.device)
    heads_per_group = num_heads // num_groups
    options = decode_attention_meta(
        sizes, k_cache_NBGd.shape[1], sliding_window, q_THd.element_size(), heads_per_group, chip_of(q_THd.device)
    )
    pointers, strides = cache_arguments(k_cache_NBGd, v_cache_NBGe, kv_scales, page_table)
    for first in range(0, num_tokens, rows_at_once):
        rows = slice(first, first + rows_at_once)
        out_rows, position_rows = out_THe[rows], position_T[rows]
        decode_attention_kernel[(len(out_rows), num_groups * options["HEAD_BLOCKS"], num_chunks)](
            q_THd[rows],
            *pointers,
            sequence_T[rows],
            position_rows,
            sinks_H if part is None else None,
            out_rows if sums is None else sums,
            part,
            *q_THd.stride()[:2],
            page_table.stride(0),
            *strides,
            num_groups,
            heads_per_group,
            num_chunks,
            scale * math.log2(math.e),
            **options,
        )
        if part is not None:
            merge_chunks_kernel[(len(out_rows), num_heads)](
                sums,
                part,
                position_rows,
                sinks_H,
                out_rows,
                num_chunks,
                **merge_chunks_meta(sizes.value, sliding_window),
            )
    return out_THe
