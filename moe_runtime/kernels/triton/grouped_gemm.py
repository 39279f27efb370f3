"""SwiGLU experts over ragged groups of rows: two grouped products with weights, gather, biases and activation fused in.

Rows are grouped by slot, and each slot's rows are cut into tiles of `BLOCK_M`. Only the device knows how many tiles a
slot has. So the grid has room for the most tiles that the rows can make, and tiles without rows return at once. The
host never waits for the counts. For large tiles, a small kernel first writes each tile's slot and rows. With the
smallest tiles, which stream weights for a few rows each, every program finds them itself, which saves a launch.

Every output is accumulated over the input features in one order, in float32, whatever rows share its tile. Weights
are dense, or quantised: then `quantized_gemm` decodes them in registers.

Shape suffixes: N input rows, R grouped rows, S local slots, D hidden, F expert intermediate; in the kernels M, N and K
are a tile's rows, weight rows and input features, P half of its weight rows, and Q is a block of tiles.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.quantized_slots import MatrixSlots
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU
from moe_runtime.kernels.torch_ops import check_contiguous, check_grouped_mlp
from moe_runtime.kernels.triton.norms import apply_swiglu
from moe_runtime.kernels.triton.quantized_gemm import Meta, code_meta, load_weights, weight_operands
from moe_runtime.kernels.triton.tiles import Tile
from moe_runtime.kernels.triton.tuned import choose_tile
from moe_runtime.types.weight_format import WeightFormat

BLOCK_TILES = 16
DECODE_ROWS = 16  # tiles with this number of rows stream weights
TILES_TOGETHER = 8  # tiles that read the weights side by side, so that they share them in L2


@triton.jit  # type: ignore[untyped-decorator]
def locate_tiles(
    tile_Q: tl.tensor, counts_ptr: tl.tensor, num_slots: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """`(slot, first row, end of the slot's rows)` of each tile; unused tiles begin at or after the end."""
    slot_S = tl.arange(0, BLOCK_S)
    counts_S = tl.load(counts_ptr + slot_S, mask=slot_S < num_slots, other=0).to(tl.int32)
    tiles_S = tl.cdiv(counts_S, BLOCK_M)
    tile_end_S = tl.cumsum(tiles_S, 0)

    is_before_QS = tile_end_S[None, :] <= tile_Q[:, None]
    slot_Q = tl.sum(is_before_QS.to(tl.int32), 1)
    first_tile_Q = tl.sum(tl.where(is_before_QS, tiles_S[None, :], 0), 1)
    slot_start_Q = tl.sum(tl.where(is_before_QS, counts_S[None, :], 0), 1)
    count_Q = tl.sum(tl.where(slot_S[None, :] == slot_Q[:, None], counts_S[None, :], 0), 1)
    return slot_Q, slot_start_Q + (tile_Q - first_tile_Q) * BLOCK_M, slot_start_Q + count_Q


@triton.jit  # type: ignore[untyped-decorator]
def tile_map_kernel(
    counts_ptr: tl.tensor,
    tile_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_tiles: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
) -> None:
    """Write the results of `locate_tiles`, three numbers per tile."""
    tile_Q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    slot_Q, row_Q, end_Q = locate_tiles(tile_Q, counts_ptr, num_slots, BLOCK_M, BLOCK_S)
    is_tile_Q = tile_Q < num_tiles
    tl.store(tile_ptr + tile_Q * 3, slot_Q, mask=is_tile_Q)
    tl.store(tile_ptr + tile_Q * 3 + 1, row_Q, mask=is_tile_Q)
    tl.store(tile_ptr + tile_Q * 3 + 2, end_Q, mask=is_tile_Q)


@triton.jit  # type: ignore[untyped-decorator]
def multiply(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    offset_factor_ptr: tl.tensor,
    row_M: tl.tensor,
    first_w_row: tl.tensor,
    w_row_N: tl.tensor,
    in_features: tl.tensor,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    SUPER_GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Rows `row_M` of `x` times rows `first_w_row + w_row_N` of `w`, `[BLOCK_M, BLOCK_N]` float32.

    All row numbers must be valid. Weights are dense if `CODE` is `None`, else see `quantized_gemm.load_weights`.
    """
    k_K = tl.arange(0, BLOCK_K)
    x_ptr_MK = x_ptr + row_M[:, None] * in_features + k_K[None, :]
    if CODE is None:
        w_ptr_KN = w_ptr + first_w_row * in_features + w_row_N[None, :] * in_features + k_K[:, None]
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        is_k_K = k_K < in_features - start
        x_MK = tl.load(x_ptr_MK) if EVEN_K else tl.load(x_ptr_MK, mask=is_k_K[None, :], other=0.0)
        if CODE is not None:
            w_NK = load_weights(
                w_ptr, scales_ptr, zeros_ptr, factor_ptr, offsets_ptr, offset_factor_ptr,
                first_w_row + w_row_N, start, in_features,
                CODE, SCALE, GROUP, UNIT, SUPER_GROUP, EVEN_K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            w_KN = tl.trans(w_NK.to(x_MK.dtype))
        else:
            w_KN = tl.load(w_ptr_KN) if EVEN_K else tl.load(w_ptr_KN, mask=is_k_K[:, None], other=0.0)
            w_ptr_KN += BLOCK_K
        acc_MN = tl.dot(x_MK, w_KN, acc_MN, input_precision="ieee")
        x_ptr_MK += BLOCK_K
    return acc_MN


@triton.jit  # type: ignore[untyped-decorator]
def place_program(num_tiles: tl.tensor, num_n: tl.tensor, GROUP_M: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Tile and block of weight rows of this program: `GROUP_M` tiles go through all weight rows together."""
    program = tl.program_id(0)
    group_size = GROUP_M * num_n
    first_tile = program // group_size * GROUP_M
    tiles_here = tl.minimum(num_tiles - first_tile, GROUP_M)
    inside = program % group_size
    return first_tile + inside % tiles_here, inside // tiles_here


@triton.jit  # type: ignore[untyped-decorator]
def grouped_gemm_kernel(
    x_ptr: tl.tensor,
    row_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    offset_factor_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tile_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_tiles: tl.tensor,
    in_features: tl.tensor,
    out_features: tl.tensor,
    SWIGLU: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CODE: tl.constexpr = None,
    SCALE: tl.constexpr = None,
    GROUP: tl.constexpr = None,
    UNIT: tl.constexpr = None,
    SUPER_GROUP: tl.constexpr = None,
) -> None:
    """`out[r] = w @ x[row[r]] + bias` of `r`'s slot; with `SWIGLU` its weight is a gate and an up projection, fused.

    `row_ptr` is `None` if the rows of `x` are in grouped order, `bias_ptr` if there are none, and `tile_ptr` if no map
    was made. With `SWIGLU` gate and up rows alternate in the tile: one product of full width, and both halves of a pair
    in one thread. With `CODE` weights are quantised and `w_ptr` are their codes, else the next five are `None`.
    """
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    tile, n_block = place_program(num_tiles, tl.cdiv(out_features, BLOCK_OUT), GROUP_M)
    if tile_ptr is None:
        slot_Q, row_Q, end_Q = locate_tiles(tile + tl.arange(0, 1), counts_ptr, num_slots, BLOCK_M, BLOCK_S)
        slot, first_row, end_row = tl.sum(slot_Q), tl.sum(row_Q), tl.sum(end_Q)
    else:
        slot = tl.load(tile_ptr + tile * 3)
        first_row = tl.load(tile_ptr + tile * 3 + 1)
        end_row = tl.load(tile_ptr + tile * 3 + 2)
    if first_row >= end_row:
        return

    # Unused rows and features read a valid address and are not stored, so that loads need no masks.
    place_M = first_row + tl.arange(0, BLOCK_M)
    is_row_M = place_M < end_row
    valid_M = tl.where(is_row_M, place_M, first_row)
    row_M = valid_M.to(tl.int64) if row_ptr is None else tl.load(row_ptr + valid_M)
    n_N = n_block * BLOCK_OUT + tl.arange(0, BLOCK_N) // (2 if SWIGLU else 1)
    w_row_N = tl.where(n_N < out_features, n_N, 0)
    if SWIGLU:
        w_row_N += tl.arange(0, BLOCK_N) % 2 * out_features
    first_w_row = slot.to(tl.int64) * out_features * (2 if SWIGLU else 1)
    acc_MN = multiply(
        x_ptr, w_ptr, scales_ptr, zeros_ptr, factor_ptr, offsets_ptr, offset_factor_ptr,
        row_M, first_w_row, w_row_N, in_features,
        CODE, SCALE, GROUP, UNIT, SUPER_GROUP, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias_ptr is not None:
        acc_MN += tl.load(bias_ptr + first_w_row + w_row_N).to(tl.float32)[None, :]
    if SWIGLU:
        gate_MP, up_MP = tl.split(tl.reshape(acc_MN, (BLOCK_M, BLOCK_OUT, 2)))
        acc_MN = apply_swiglu(gate_MP, up_MP, ALPHA, LIMIT, OFFSET)

    n = n_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_ptr_MN = out_ptr + place_M.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out_ptr_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=is_row_M[:, None] & (n < out_features)[None, :])


def tile_map_meta(tile: Tile, num_slots: int) -> dict[str, int]:
    """Constants and launch options of `tile_map_kernel`."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_S": triton.next_power_of_2(num_slots),
        "BLOCK_Q": BLOCK_TILES,
        "enable_fp_fusion": False,  # without it Triton 3.9 warns
    }


def gemm_meta(tile: Tile, in_features: int, format: WeightFormat | None = None) -> Meta:
    """Constants and launch options of a product; `format` is that of quantised weights."""
    return code_meta(format, in_features, tile.block_k) | {
        "EVEN_K": in_features % tile.block_k == 0,
        "GROUP_M": TILES_TOGETHER,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,  # float32 products are chains of fused multiply-adds
    }


def grouped_gemm_meta(
    tile: Tile, *, swiglu: SwiGLU | None, in_features: int, num_slots: int, format: WeightFormat | None = None
) -> Meta:
    """Constants and launch options of `grouped_gemm_kernel`; `swiglu` is `None` for the down projection."""
    streams = tile.block_m == DECODE_ROWS
    numbers = dataclasses.asdict(PLAIN if swiglu is None else swiglu)
    return gemm_meta(tile, in_features, format) | {
        "SWIGLU": swiglu is not None,
        **{name.upper(): number for name, number in numbers.items()},
        "GROUP_M": 1 if streams else TILES_TOGETHER,
        "BLOCK_S": triton.next_power_of_2(num_slots) if streams else 1,
    }


def grouped_mlp(
    x_ND: Tensor,
    row_R: Tensor | None,
    counts_S: Tensor,
    w13_SGD: MatrixSlots,
    w2_SDF: MatrixSlots,
    *,
    b13_SG: Tensor | None = None,
    b2_SD: Tensor | None = None,
    swiglu: SwiGLU = PLAIN,
    tile: Tile | None = None,
) -> Tensor:
    """The Triton form of `torch_ops.grouped_mlp`, same arguments and result; it never waits for the device.

    Args:
        tile: default the tuned one for this GPU, else the one of the performance model.

    Raises:
        ValueError: shapes or dtypes do not fit together, or an operand is not contiguous.
    """
    check_grouped_mlp(x_ND, row_R, counts_S, w13_SGD, w2_SDF, b13_SG, b2_SD)
    check_contiguous(x_ND=x_ND, row_R=row_R, counts_S=counts_S, b13_SG=b13_SG, b2_SD=b2_SD)
    w13, w2 = weight_operands("w13_SGD", w13_SGD), weight_operands("w2_SDF", w2_SDF)
    num_rows = len(x_ND) if row_R is None else len(row_R)
    num_slots, hidden, intermediate = w2_SDF.shape
    if tile is None:
        tile = choose_tile(num_rows, num_slots, hidden, intermediate, x_ND.dtype, x_ND.device, w13.format)
    product_RF = x_ND.new_empty(num_rows, intermediate)
    out_RD = x_ND.new_empty(num_rows, hidden)
    if num_rows == 0:
        return out_RD

    # Each slot that has rows ends with at most one tile that is not full.
    num_tiles = num_rows // tile.block_m + min(num_slots, num_rows)
    tiles = None
    if tile.block_m != DECODE_ROWS:
        tiles = torch.empty((num_tiles, 3), dtype=torch.int32, device=x_ND.device)
        tile_map_kernel[(triton.cdiv(num_tiles, BLOCK_TILES),)](
            counts_S, tiles, num_slots, num_tiles, **tile_map_meta(tile, num_slots)
        )
    up, down = (x_ND, row_R, w13, b13_SG, product_RF, swiglu), (product_RF, None, w2, b2_SD, out_RD, None)
    for x, row, w, bias, out, activation in (up, down):
        in_features, out_features = x.shape[1], out.shape[1]
        meta = grouped_gemm_meta(tile, swiglu=activation, in_features=in_features, num_slots=num_slots, format=w.format)
        w_rows = out_features if activation is None else 2 * out_features
        grid = (num_tiles * triton.cdiv(w_rows, tile.block_n),)
        counts = counts_S if tiles is None else None
        grouped_gemm_kernel[grid](
            x, row, *w.tensors, bias, out, tiles, counts, num_slots, num_tiles, in_features, out_features, **meta
        )
    return out_RD
