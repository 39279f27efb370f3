"""The permutation between tokens and experts: rows grouped by slot, and the weighted sum that undoes it.

Grouping is a counting sort in two launches. Rows are cut into blocks. The first kernel counts each block's rows per
slot. The second sums the counts before its block and gives every row its place. It uses no atomics, so rows keep their
order within a slot. No size depends on the data, so the host never waits.

Shape suffixes: T tokens, K experts per token, D hidden, S slots, R rows; in the kernels B is a batch of blocks and C a
chunk of a block's rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.torch_ops import check_contiguous

MAX_BLOCKS = 128
MIN_BLOCK_ROWS = 64
BLOCKS_TOGETHER = 16
ELEMENTS = 8192  # rows times slots of a chunk, which is in registers
BLOCK_D = 1024


@triton.jit  # type: ignore[untyped-decorator]
def count_kernel(
    slot_ptr: tl.tensor,
    count_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Rows of each slot in each block of rows."""
    block = tl.program_id(0)
    slot_S = tl.arange(0, BLOCK_S)
    count_S = tl.zeros((BLOCK_S,), dtype=tl.int32)
    for start in range(0, BLOCK_R, BLOCK_C):
        row_C = block * BLOCK_R + start + tl.arange(0, BLOCK_C)
        slot_C = tl.load(slot_ptr + row_C, mask=row_C < num_rows, other=-1).to(tl.int32)
        count_S += tl.sum((slot_C[:, None] == slot_S[None, :]).to(tl.int32), 0)
    tl.store(count_ptr + block * num_slots + slot_S, count_S, mask=slot_S < num_slots)


@triton.jit  # type: ignore[untyped-decorator]
def place_kernel(
    slot_ptr: tl.tensor,
    count_ptr: tl.tensor,
    order_ptr: tl.tensor,
    place_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Place of each row of a block, the inverse, and the rows of each slot; rows without a slot go last."""
    block = tl.program_id(0)
    slot_S = tl.arange(0, BLOCK_S)
    before_S = tl.zeros((BLOCK_S,), dtype=tl.int32)
    total_S = tl.zeros((BLOCK_S,), dtype=tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        block_B = start + tl.arange(0, BLOCK_B)
        is_count_BS = (block_B < num_blocks)[:, None] & (slot_S < num_slots)[None, :]
        count_BS = tl.load(count_ptr + block_B[:, None] * num_slots + slot_S[None, :], mask=is_count_BS, other=0)
        total_S += tl.sum(count_BS, 0)
        before_S += tl.sum(tl.where(block_B[:, None] < block, count_BS, 0), 0)
    if block == 0:
        tl.store(counts_ptr + slot_S, total_S.to(tl.int64), mask=slot_S < num_slots)

    next_S = tl.cumsum(total_S, 0) - total_S + before_S
    next_without = tl.sum(total_S) + block * BLOCK_R - tl.sum(before_S)
    for start in range(0, BLOCK_R, BLOCK_C):
        row_C = block * BLOCK_R + start + tl.arange(0, BLOCK_C)
        is_row_C = row_C < num_rows
        slot_C = tl.load(slot_ptr + row_C, mask=is_row_C, other=-1).to(tl.int32)
        is_slot_CS = (slot_C[:, None] == slot_S[None, :]).to(tl.int32)
        without_C = ((slot_C < 0) & is_row_C).to(tl.int32)
        place_C = tl.sum(is_slot_CS * (next_S[None, :] + tl.cumsum(is_slot_CS, 0) - 1), 1)
        place_C = tl.where(slot_C < 0, next_without + tl.cumsum(without_C, 0) - 1, place_C)
        tl.store(order_ptr + place_C, row_C.to(tl.int64), mask=is_row_C)
        tl.store(place_ptr + row_C, tl.where(slot_C < 0, -1, place_C).to(tl.int64), mask=is_row_C)
        next_S += tl.sum(is_slot_CS, 0)
        next_without += tl.sum(without_C)


@triton.jit  # type: ignore[untyped-decorator]
def combine_kernel(
    y_ptr: tl.tensor,
    place_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    hidden: tl.tensor,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """The weighted sum of a token's rows, in order of k; `place_ptr` is `None` if the rows are adjacent."""
    token = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_d_D = d_D < hidden
    total_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        place = pair if place_ptr is None else tl.load(place_ptr + pair)
        offset_D = place * hidden + d_D  # negative if the pair has no place
        y_D = tl.load(y_ptr + offset_D, mask=is_d_D & (offset_D >= 0), other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        total_D += y_D * weight
    tl.store(out_ptr + token * hidden + d_D, total_D.to(out_ptr.dtype.element_ty), mask=is_d_D)


def group_meta(num_rows: int, num_slots: int) -> dict[str, int]:
    """Constants and launch options that `count_kernel` and `place_kernel` share."""
    block_s = triton.next_power_of_2(num_slots)
    return {
        "BLOCK_R": max(MIN_BLOCK_ROWS, triton.next_power_of_2(triton.cdiv(num_rows, MAX_BLOCKS))),
        "BLOCK_C": min(MIN_BLOCK_ROWS, max(1, ELEMENTS // block_s)),
        "BLOCK_S": block_s,
        "enable_fp_fusion": False,
    }


def combine_meta(hidden: int, top_k: int) -> dict[str, int]:
    """Constants and launch options of `combine_kernel`."""
    return {
        "TOP_K": top_k,
        "BLOCK_D": min(BLOCK_D, triton.next_power_of_2(hidden)),
        "enable_fp_fusion": False,  # products are rounded before they are summed, as in torch
    }


def group_by_slot_padded(slot_R: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton form of `torch_ops.group_by_slot_padded`, same arguments and result.

    Raises:
        ValueError: `slot_R` is not contiguous.
    """
    check_contiguous(slot_R=slot_R)
    num_rows = len(slot_R)
    order_R, place_R = torch.empty((2, num_rows), dtype=torch.int64, device=slot_R.device)
    if num_rows == 0:
        return order_R, place_R, slot_R.new_zeros(num_slots, dtype=torch.int64)
    meta = group_meta(num_rows, num_slots)
    num_blocks = triton.cdiv(num_rows, meta["BLOCK_R"])
    count_BS = torch.empty((num_blocks, num_slots), dtype=torch.int32, device=slot_R.device)
    counts_S = torch.empty(num_slots, dtype=torch.int64, device=slot_R.device)
    count_kernel[(num_blocks,)](slot_R, count_BS, num_rows, num_slots, **meta)
    place_kernel[(num_blocks,)](
        slot_R, count_BS, order_R, place_R, counts_S, num_rows, num_slots, num_blocks, BLOCK_B=BLOCKS_TOGETHER, **meta
    )
    return order_R, place_R, counts_S


def group_by_slot(slot_R: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """The Triton form of `torch_ops.group_by_slot`, same arguments and result; it waits for the device."""
    order_R, _, counts_S = group_by_slot_padded(slot_R, num_slots)
    return order_R[: int(counts_S.sum())], counts_S


def combine_topk(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """The Triton form of `torch_ops.combine_topk`, same arguments and result.

    Raises:
        ValueError: an operand is not contiguous.
    """
    check_contiguous(y_TKD=y_TKD, weights_TK=weights_TK)
    return _combine(y_TKD.flatten(0, 1), None, weights_TK)


def combine_grouped(y_RD: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The Triton form of `torch_ops.combine_grouped`, same arguments and result.

    Raises:
        ValueError: an operand is not contiguous.
    """
    check_contiguous(y_RD=y_RD, place_TK=place_TK, weights_TK=weights_TK)
    return _combine(y_RD, place_TK, weights_TK)


def _combine(y_RD: Tensor, place_TK: Tensor | None, weights_TK: Tensor) -> Tensor:
    (num_tokens, top_k), hidden = weights_TK.shape, y_RD.shape[1]
    out_TD = y_RD.new_empty(num_tokens, hidden)
    if num_tokens:
        meta = combine_meta(hidden, top_k)
        grid = (num_tokens, triton.cdiv(hidden, meta["BLOCK_D"]))
        combine_kernel[grid](y_RD, place_TK, weights_TK, out_TD, hidden, **meta)
    return out_TD
