"""SwiGLU experts over ragged groups of rows: two grouped products with weights, gather and activation fused in.

Rows are grouped by slot, and each slot's rows are cut into tiles of `BLOCK_M`. How many tiles a slot has is known on
the device alone, so the grid has room for the most tiles that the rows can make, a small kernel writes which slot and
rows each tile holds, and tiles without rows return at once. The host never waits for the counts.

Every output is accumulated over the input features in one order, in float32, whatever rows share its tile.

Shape suffixes: N input rows, R grouped rows, S local slots, D hidden, F expert intermediate; in the kernels M, N and K
are a tile's rows, output features and input features, and Q is a block of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.torch_ops import check_contiguous, check_grouped_mlp

BLOCK_TILES = 16


@dataclass(frozen=True)
class Tile:
    """How one program cuts the product.

    Attributes:
        block_m: rows.
        block_n: weight rows; the fused product takes half of them from the gate and half from the up projection.
        block_k: input features per step.
        num_warps: warps of a program.
        num_stages: depth of the load pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Every tile fits in the 99 KB of shared memory that the smallest chips (8.6, 8.9 and 12.0) give to a program.
# Few rows per slot: reading weights is all the time there is, so the rows are padded little and many loads are in
# flight. Many rows: large tiles, so that each weight read serves many rows.
TILES_16_BIT: tuple[Tile, ...] = (
    Tile(block_m=16, block_n=128, block_k=64, num_warps=4, num_stages=4),
    Tile(block_m=32, block_n=128, block_k=64, num_warps=4, num_stages=4),
    Tile(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3),
    Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
)
# float32 is multiplied without tensor cores, to keep all its bits; registers limit the tile.
TILES_32_BIT: tuple[Tile, ...] = (
    Tile(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=3),
    Tile(block_m=64, block_n=64, block_k=32, num_warps=8, num_stages=3),
)


def choose_tile(num_rows: int, num_slots: int, dtype: torch.dtype) -> Tile:
    """The smallest tile that holds the mean slot's rows, else the largest.

    Raises:
        ValueError: the dtype has no kernel.
    """
    if dtype in (torch.bfloat16, torch.float16):
        tiles = TILES_16_BIT
    elif dtype == torch.float32:
        tiles = TILES_32_BIT
    else:
        raise ValueError(f"dtype: {dtype} is not allowed; it must be bfloat16, float16 or float32")
    rows_per_slot = num_rows / num_slots
    return next((tile for tile in tiles if rows_per_slot <= tile.block_m), tiles[-1])


@triton.jit  # type: ignore[untyped-decorator]
def tile_map_kernel(
    counts_ptr: tl.tensor,
    tile_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_rows: tl.tensor,
    num_tiles: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
) -> None:
    """Write `(slot, first row, end of the slot's rows)` of each tile; tiles to spare begin at the end or behind it."""
    tile_Q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    slot_S = tl.arange(0, BLOCK_S)
    counts_S = tl.load(counts_ptr + slot_S, mask=slot_S < num_slots, other=0).to(tl.int32)
    tiles_S = tl.cdiv(counts_S, BLOCK_M)
    tile_end_S = tl.cumsum(tiles_S, 0)

    is_before_QS = tile_end_S[None, :] <= tile_Q[:, None]
    slot_Q = tl.sum(is_before_QS.to(tl.int32), 1)
    first_tile_Q = tl.sum(tl.where(is_before_QS, tiles_S[None, :], 0), 1)
    slot_start_Q = tl.sum(tl.where(is_before_QS, counts_S[None, :], 0), 1)
    count_Q = tl.sum(tl.where(slot_S[None, :] == slot_Q[:, None], counts_S[None, :], 0), 1)
    row_Q = slot_start_Q + (tile_Q - first_tile_Q) * BLOCK_M
    end_Q = tl.minimum(slot_start_Q + count_Q, num_rows)

    is_tile_Q = tile_Q < num_tiles
    tl.store(tile_ptr + tile_Q * 3, slot_Q, mask=is_tile_Q)
    tl.store(tile_ptr + tile_Q * 3 + 1, row_Q, mask=is_tile_Q)
    tl.store(tile_ptr + tile_Q * 3 + 2, end_Q, mask=is_tile_Q)


@triton.jit  # type: ignore[untyped-decorator]
def grouped_gemm_kernel(
    x_ptr: tl.tensor,
    row_ptr: tl.tensor,
    w_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tile_ptr: tl.tensor,
    in_features: tl.tensor,
    out_features: tl.tensor,
    SWIGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """`out[r] = w[slot of r] @ x[row[r]]`; with `SWIGLU` the slot's weight is a gate and an up projection, fused.

    `row_ptr` is `None` where the rows of `x` are in grouped order.
    """
    tile = tl.program_id(1)
    slot = tl.load(tile_ptr + tile * 3).to(tl.int64)
    first_row = tl.load(tile_ptr + tile * 3 + 1)
    end_row = tl.load(tile_ptr + tile * 3 + 2)
    if first_row >= end_row:
        return

    place_M = first_row + tl.arange(0, BLOCK_M)
    is_row_M = place_M < end_row
    row_M = place_M.to(tl.int64) if row_ptr is None else tl.load(row_ptr + place_M, mask=is_row_M, other=0)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n_N = n_N < out_features
    k_K = tl.arange(0, BLOCK_K)

    x_ptr_MK = x_ptr + row_M[:, None] * in_features + k_K[None, :]
    weight_size = out_features * in_features
    w_ptr += slot * weight_size * (2 if SWIGLU else 1)
    w_ptr_KN = w_ptr + n_N[None, :] * in_features + k_K[:, None]
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        is_k_K = k_K < in_features - start
        x_MK = tl.load(x_ptr_MK + start, mask=is_row_M[:, None] & is_k_K[None, :], other=0.0)
        is_w_KN = is_k_K[:, None] & is_n_N[None, :]
        w_KN = tl.load(w_ptr_KN + start, mask=is_w_KN, other=0.0)
        acc_MN = tl.dot(x_MK, w_KN, acc_MN, input_precision="ieee")
        if SWIGLU:
            w_up_KN = tl.load(w_ptr_KN + weight_size + start, mask=is_w_KN, other=0.0)
            up_MN = tl.dot(x_MK, w_up_KN, up_MN, input_precision="ieee")

    if SWIGLU:
        acc_MN = acc_MN / (1.0 + tl.exp(-acc_MN)) * up_MN
    out_ptr_MN = out_ptr + place_M.to(tl.int64)[:, None] * out_features + n_N[None, :]
    tl.store(out_ptr_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=is_row_M[:, None] & is_n_N[None, :])


def tile_map_meta(tile: Tile, num_slots: int) -> dict[str, int]:
    """Constants and launch options of `tile_map_kernel`."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_S": triton.next_power_of_2(num_slots),
        "BLOCK_Q": BLOCK_TILES,
        "enable_fp_fusion": False,  # left out, Triton 3.9 warns
    }


def grouped_gemm_meta(tile: Tile, *, swiglu: bool) -> dict[str, int]:
    """Constants and launch options of `grouped_gemm_kernel`."""
    return {
        "SWIGLU": swiglu,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n // 2 if swiglu else tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,  # float32 products are chains of fused multiply-adds
    }


def grouped_mlp(x_ND: Tensor, row_R: Tensor | None, counts_S: Tensor, w13_SGD: Tensor, w2_SDF: Tensor) -> Tensor:
    """The Triton form of `torch_ops.grouped_mlp`, same arguments and result; it never waits for the device.

    Raises:
        ValueError: shapes or dtypes do not fit together, or an operand is not contiguous.
    """
    check_grouped_mlp(x_ND, row_R, counts_S, w13_SGD, w2_SDF)
    check_contiguous(x_ND=x_ND, row_R=row_R, counts_S=counts_S, w13_SGD=w13_SGD, w2_SDF=w2_SDF)
    num_rows = len(x_ND) if row_R is None else len(row_R)
    num_slots, hidden, intermediate = w2_SDF.shape
    tile = choose_tile(num_rows, num_slots, x_ND.dtype)
    product_RF = x_ND.new_empty(num_rows, intermediate)
    out_RD = x_ND.new_empty(num_rows, hidden)
    if num_rows == 0:
        return out_RD

    # Each slot that has rows ends with at most one tile that is not full.
    num_tiles = num_rows // tile.block_m + min(num_slots, num_rows)
    tiles = torch.empty((num_tiles, 3), dtype=torch.int32, device=x_ND.device)
    tile_map_kernel[(triton.cdiv(num_tiles, BLOCK_TILES),)](
        counts_S, tiles, num_slots, num_rows, num_tiles, **tile_map_meta(tile, num_slots)
    )
    _launch_gemm(x_ND, row_R, w13_SGD, product_RF, tiles, grouped_gemm_meta(tile, swiglu=True))
    _launch_gemm(product_RF, None, w2_SDF, out_RD, tiles, grouped_gemm_meta(tile, swiglu=False))
    return out_RD


def _launch_gemm(x: Tensor, row_R: Tensor | None, w: Tensor, out: Tensor, tiles: Tensor, meta: dict[str, int]) -> None:
    # Blocks of output features vary fastest: the programs that run together share their rows.
    grid = (triton.cdiv(out.shape[1], meta["BLOCK_N"]), len(tiles))
    grouped_gemm_kernel[grid](x, row_R, w, out, tiles, x.shape[1], out.shape[1], **meta)
