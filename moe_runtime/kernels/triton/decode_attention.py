"""Attention of single rows, split over their keys: for decode, and for all rows if results must be batch-invariant.

The keys of a sequence are cut at fixed positions, every `CHUNK` keys from its beginning. Each program attends from all
heads of a group to one chunk, and a second kernel merges the chunks in order. A row's result depends on its own keys
alone, bit for bit, whatever else is in the batch. Softmax is in float32.

Shape suffixes: T tokens, H query heads, G key/value heads, d head size, N pages, B tokens per page, S sequences,
X chunks; in the kernels M is a block of (token, head) pairs, C of keys, D of the head's numbers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.torch_ops import check_contiguous
from moe_runtime.kernels.triton.attend import attend, attention_meta, check_attention

CHUNK = 256
CHUNKS_TOGETHER = 16


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
    table_ptr: tl.tensor,
    sequence_ptr: tl.tensor,
    position_ptr: tl.tensor,
    out_ptr: tl.tensor,
    part_ptr: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    num_groups: tl.tensor,
    heads_per_group: tl.tensor,
    head_size: tl.tensor,
    num_chunks: tl.tensor,
    scale: tl.tensor,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One row, the heads of one group, one chunk of keys. With one chunk the result is final and `part_ptr` is `None`.
    Else `out_ptr` gets sums not yet divided, and `part_ptr` gets each chunk's sum of weights and largest score."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    position = tl.load(position_ptr + token).to(tl.int32)
    chunk = first_chunk_of(position, WINDOW, CHUNK_SIZE) + tl.program_id(2)
    first_key = chunk * CHUNK_SIZE
    end_key = tl.minimum(first_key + CHUNK_SIZE, position + 1)
    if first_key >= end_key:
        return

    head_M = tl.arange(0, BLOCK_M)
    d_D = tl.arange(0, BLOCK_D)
    is_q_MD = (head_M < heads_per_group)[:, None] & (d_D < head_size)[None, :]
    head_M += group * heads_per_group
    q_MD = tl.load(
        q_ptr + token * q_token_stride + head_M[:, None] * q_head_stride + d_D[None, :], mask=is_q_MD, other=0.0
    )
    table_ptr += tl.load(sequence_ptr + token).to(tl.int64) * table_stride
    acc_MD, total_M, max_M = attend(
        q_MD, tl.zeros((BLOCK_M,), dtype=tl.int32) + position, first_key, end_key,
        k_ptr + group * head_size, v_ptr + group * head_size, table_ptr, num_groups * head_size, head_size, scale,
        WINDOW, PAGE, EVEN_D, BLOCK_M, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    row_M = (token * num_groups * heads_per_group + head_M) * num_chunks + tl.program_id(2)
    if part_ptr is None:
        acc_MD = acc_MD / total_M[:, None]
    else:
        is_head_M = tl.arange(0, BLOCK_M) < heads_per_group
        tl.store(part_ptr + row_M * 2, total_M, mask=is_head_M)
        tl.store(part_ptr + row_M * 2 + 1, max_M, mask=is_head_M)
    tl.store(out_ptr + row_M[:, None] * head_size + d_D[None, :], acc_MD.to(out_ptr.dtype.element_ty), mask=is_q_MD)


@triton.jit  # type: ignore[untyped-decorator]
def merge_chunks_kernel(
    sum_ptr: tl.tensor,
    part_ptr: tl.tensor,
    position_ptr: tl.tensor,
    out_ptr: tl.tensor,
    head_size: tl.tensor,
    num_chunks: tl.tensor,
    WINDOW: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Sums of one row and head over its chunks, in order, divided at the end."""
    token = tl.program_id(0).to(tl.int64)
    row = token * tl.num_programs(1) + tl.program_id(1)
    position = tl.load(position_ptr + token).to(tl.int32)
    used = position // CHUNK_SIZE + 1 - first_chunk_of(position, WINDOW, CHUNK_SIZE)
    d_D = tl.arange(0, BLOCK_D)
    acc_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    total = 0.0
    largest = float("-inf")
    for start in range(0, used, BLOCK_X):
        chunk_X = start + tl.arange(0, BLOCK_X)
        is_used_X = chunk_X < used
        place_X = row * num_chunks + chunk_X
        total_X = tl.load(part_ptr + place_X * 2, mask=is_used_X, other=0.0)
        max_X = tl.load(part_ptr + place_X * 2 + 1, mask=is_used_X, other=float("-inf"))
        is_sum_XD = is_used_X[:, None] & (d_D < head_size)[None, :]
        sum_XD = tl.load(sum_ptr + place_X[:, None] * head_size + d_D[None, :], mask=is_sum_XD, other=0.0)
        new_largest = tl.maximum(largest, tl.max(max_X))
        share_X = tl.exp2(max_X - new_largest)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(total_X * share_X)
        acc_D = acc_D * shrink + tl.sum(sum_XD * share_X[:, None], 0)
        largest = new_largest
    tl.store(out_ptr + row * head_size + d_D, (acc_D / total).to(out_ptr.dtype.element_ty), mask=d_D < head_size)


def decode_attention_meta(
    head_size: int, page_size: int, sliding_window: int | None, itemsize: int, heads_per_group: int
) -> dict[str, int]:
    """Constants and launch options of `decode_attention_kernel`."""
    rows = max(16, triton.next_power_of_2(heads_per_group))  # a tensor core takes at least 16 rows
    return attention_meta(head_size, page_size, sliding_window, itemsize, rows=rows, keys=64) | {"CHUNK_SIZE": CHUNK}


def merge_chunks_meta(head_size: int, sliding_window: int | None) -> dict[str, int]:
    """Constants and launch options of `merge_chunks_kernel`."""
    return {
        "WINDOW": sliding_window or 0,
        "CHUNK_SIZE": CHUNK,
        "BLOCK_X": CHUNKS_TOGETHER,
        "BLOCK_D": triton.next_power_of_2(head_size),
        "enable_fp_fusion": False,
    }


def max_chunks(max_context: int, sliding_window: int | None) -> int:
    """The most chunks whose keys a row may see."""
    num_chunks = -(-max_context // CHUNK)
    if sliding_window is None:
        return num_chunks
    return min(num_chunks, (sliding_window - 2) // CHUNK + 2)  # the window may begin in the middle of a chunk


def decode_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    page_table: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    *,
    max_context: int,
    scale: float,
    sliding_window: int | None,
    out_THd: Tensor | None = None,
) -> Tensor:
    """Attention of rows of any sequence and position; all values that depend on the step are on the device.

    A row's result depends on its own keys alone, bit for bit. The launches depend on `max_context` alone, so they can
    be captured once for the longest context.

    Args:
        q_THd: `[T, H, d]`.
        page_table: int64 `[S, max_pages]`, pages of each sequence.
        sequence_T: int32 or int64, which row of the page table each token uses.
        position_T: int32 or int64; a row sees the keys up to its own position.
        max_context: at least the largest position plus one.
        out_THd: contiguous; default a new one.

    Returns:
        `[T, H, d]` in the dtype of `q_THd`.

    Raises:
        ValueError: operands do not fit together.
    """
    num_groups = check_attention(q_THd, k_cache_NBGd, v_cache_NBGd)
    check_contiguous(sequence_T=sequence_T, position_T=position_T, out_THd=out_THd)
    num_tokens, num_heads, head_size = q_THd.shape
    out_THd = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device) if out_THd is None else out_THd
    if num_tokens == 0:
        return out_THd
    num_chunks = max_chunks(max_context, sliding_window)
    sums, part = out_THd, None
    if num_chunks > 1:
        sums = torch.empty(num_tokens, num_heads, num_chunks, head_size, device=q_THd.device)
        part = torch.empty(num_tokens, num_heads, num_chunks, 2, device=q_THd.device)
    heads_per_group = num_heads // num_groups
    decode_attention_kernel[(num_tokens, num_groups, num_chunks)](
        q_THd,
        k_cache_NBGd,
        v_cache_NBGd,
        page_table,
        sequence_T,
        position_T,
        sums,
        part,
        *q_THd.stride()[:2],
        page_table.stride(0),
        num_groups,
        heads_per_group,
        head_size,
        num_chunks,
        scale * math.log2(math.e),
        **decode_attention_meta(
            head_size, k_cache_NBGd.shape[1], sliding_window, q_THd.element_size(), heads_per_group
        ),
    )
    if part is not None:
        merge_chunks_kernel[(num_tokens, num_heads)](
            sums, part, position_T, out_THd, head_size, num_chunks, **merge_chunks_meta(head_size, sliding_window)
        )
    return out_THd
