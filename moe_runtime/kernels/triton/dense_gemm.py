"""The product of rows with one matrix, dense or quantised.

Every output is accumulated over the input features in one order, in float32, whatever rows share its tile.

Shape suffixes: N rows, I and O input and output features; in the kernel M, N and K as in `grouped_gemm`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.kernels.quantized_ops import check_linear
from moe_runtime.kernels.quantized_slots import Matrix
from moe_runtime.kernels.torch_ops import check_contiguous
from moe_runtime.kernels.triton.grouped_gemm import gemm_meta, multiply, place_program
from moe_runtime.kernels.triton.quantized_gemm import weight_operands
from moe_runtime.kernels.triton.tiles import Tile, chip_of, invariant_tile, linear_tile, rows_bucket


@triton.jit  # type: ignore[untyped-decorator]
def dense_gemm_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    offset_factor_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    in_features: tl.tensor,
    out_features: tl.tensor,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CODE: tl.constexpr = None,
    SCALE: tl.constexpr = None,
    GROUP: tl.constexpr = None,
    UNIT: tl.constexpr = None,
    SUPER_GROUP: tl.constexpr = None,
) -> None:
    """`out = x @ w.T + bias`; `bias_ptr` may be `None`. Weights are as in `grouped_gemm_kernel`."""
    tile, n_block = place_program(tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N), GROUP_M)
    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_M = tl.where(row_M < num_rows, row_M, 0).to(tl.int64)
    valid_N = tl.where(n_N < out_features, n_N, 0).to(tl.int64)
    acc_MN = multiply(
        x_ptr, w_ptr, scales_ptr, zeros_ptr, factor_ptr, offsets_ptr, offset_factor_ptr,
        valid_M, 0, valid_N, in_features,
        CODE, SCALE, GROUP, UNIT, SUPER_GROUP, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias_ptr is not None:
        acc_MN += tl.load(bias_ptr + valid_N).to(tl.float32)[None, :]
    out_ptr_MN = out_ptr + row_M.to(tl.int64)[:, None] * out_features + n_N[None, :]
    is_out_MN = (row_M < num_rows)[:, None] & (n_N < out_features)[None, :]
    tl.store(out_ptr_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=is_out_MN)


def linear(x_NI: Tensor, weight_OI: Matrix, bias_O: Tensor | None = None, *, tile: Tile | None = None) -> Tensor:
    """`x @ weight.T + bias`, `[N, O]`, rounded once; a row's result does not depend on the other rows, bit for bit.

    Args:
        tile: default `invariant_tile`; another gives other bits.

    Raises:
        ValueError: shapes or dtypes do not fit together, or an operand is not contiguous.
    """
    check_linear(x_NI, weight_OI)
    check_contiguous(x_NI=x_NI, bias_O=bias_O)
    weight = weight_operands("weight_OI", weight_OI)
    (num_rows, in_features), out_features = x_NI.shape, len(weight_OI)
    tile = invariant_tile(x_NI.dtype) if tile is None else tile
    out_NO = x_NI.new_empty(num_rows, out_features)
    if num_rows:
        grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(out_features, tile.block_n),)
        meta = gemm_meta(tile, in_features, weight.format)
        dense_gemm_kernel[grid](x_NI, *weight.tensors, bias_O, out_NO, num_rows, in_features, out_features, **meta)
    return out_NO


def quantized_linear(x_NI: Tensor, weight_OI: QuantizedMatrix, bias_O: Tensor | None = None) -> Tensor:
    """The Triton form of `quantized_ops.quantized_linear`, with the tile that the performance model chooses.

    Raises:
        ValueError: shapes do not fit together, or an operand is not contiguous.
    """
    num_rows, in_features = rows_bucket(len(x_NI)), weight_OI.num_inputs
    bits, chip = weight_OI.format.code.bits, chip_of(x_NI.device)
    tile = linear_tile(num_rows, len(weight_OI), in_features, x_NI.dtype, bits, chip)
    return linear(x_NI, weight_OI, bias_O, tile=tile)
