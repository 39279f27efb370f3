"""Root mean square norm after the residual sum, and the SwiGLU activation, alone and for products that end with it.

A program holds whole rows. Rows need not be adjacent, for example heads inside a projection's output. Everything is
rounded where the torch twins round it.

Shape suffixes: T tokens, D row, F activation, H heads of a token, R rows of a program, M and P as in
`grouped_gemm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.torch_ops import check_contiguous

ELEMENTS = 1024  # of a program, if rows are shorter
BLOCK_F = 1024


@triton.jit  # type: ignore[untyped-decorator]
def rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    multiplier: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """The norm of each row; with `residual_ptr` and `sum_ptr` (else `None`), of `residual + multiplier * x`."""
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d_D = tl.arange(0, BLOCK_D)
    is_x_RD = (row_R < num_rows)[:, None] & (d_D < size)[None, :]
    place_RD = (row_R // num_heads * token_stride + row_R % num_heads * head_stride)[:, None] + d_D[None, :]
    out_RD = row_R[:, None] * size + d_D[None, :]
    dtype = out_ptr.dtype.element_ty

    x_RD = tl.load(x_ptr + place_RD, mask=is_x_RD, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x_RD = x_RD * multiplier + tl.load(residual_ptr + out_RD, mask=is_x_RD, other=0.0).to(tl.float32)
        sum_RD = x_RD.to(dtype)
        tl.store(sum_ptr + out_RD, sum_RD, mask=is_x_RD)
        x_RD = sum_RD.to(tl.float32)
    scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / size + eps)
    normed_RD = (x_RD * scale_R[:, None]).to(dtype).to(tl.float32)
    weight_D = tl.load(weight_ptr + d_D, mask=d_D < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_RD, (normed_RD * weight_D[None, :]).to(dtype), mask=is_x_RD)


@triton.jit  # type: ignore[untyped-decorator]
def silu_mul_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, size: tl.tensor, BLOCK_F: tl.constexpr) -> None:
    """`silu(gate) * up` of one row, the gate rounded before the product."""
    row = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    dtype = out_ptr.dtype.element_ty
    gate_F = tl.load(x_ptr + row * 2 * size + f_F, mask=f_F < size, other=0.0).to(tl.float32)
    up_F = tl.load(x_ptr + row * 2 * size + size + f_F, mask=f_F < size, other=0.0).to(tl.float32)
    gate_F = (gate_F / (1.0 + tl.exp(-gate_F))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + f_F, (gate_F * up_F).to(dtype), mask=f_F < size)


@triton.jit  # type: ignore[untyped-decorator]
def apply_swiglu(
    gate_MP: tl.tensor, up_MP: tl.tensor, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr
) -> tl.tensor:
    """`kernels.swiglu.SwiGLU` in float32. What the defaults do not need is not computed; NaN stays NaN."""
    if float("inf") > LIMIT:
        gate_MP = tl.minimum(gate_MP, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up_MP = tl.clamp(up_MP, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if OFFSET != 0.0:
        up_MP += OFFSET
    scaled_MP = gate_MP if ALPHA == 1.0 else gate_MP * ALPHA
    return gate_MP / (1.0 + tl.exp(-scaled_MP)) * up_MP


@triton.jit  # type: ignore[untyped-decorator]
def scale_rows_kernel(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    size: tl.tensor,
    BLOCK_D: tl.constexpr,
) -> None:
    """A row times the sigmoid of the product of its row of `x_ptr` with the gate."""
    row = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, BLOCK_D)
    x_D = tl.load(x_ptr + row * size + d_D, mask=d_D < size, other=0.0).to(tl.float32)
    gate_D = tl.load(gate_ptr + d_D, mask=d_D < size, other=0.0).to(tl.float32)
    factor = 1.0 / (1.0 + tl.exp(-tl.sum(x_D * gate_D)))
    row_D = tl.load(rows_ptr + row * size + d_D, mask=d_D < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + d_D, (row_D * factor).to(out_ptr.dtype.element_ty), mask=d_D < size)


def scale_rows_meta(size: int) -> dict[str, int]:
    """Constants and launch options of `scale_rows_kernel`."""
    block_d = triton.next_power_of_2(size)
    return {"BLOCK_D": block_d, "num_warps": 4 if block_d <= 4096 else 16, "enable_fp_fusion": False}


def rms_norm_meta(size: int) -> dict[str, int]:
    """Constants and launch options of `rms_norm_kernel`."""
    block_d = triton.next_power_of_2(size)
    return {
        "BLOCK_R": max(1, min(16, ELEMENTS // block_d)),
        "BLOCK_D": block_d,
        "num_warps": 4 if block_d <= 4096 else 16,
        "enable_fp_fusion": False,
    }


def silu_mul_meta(size: int) -> dict[str, int]:
    """Constants and launch options of `silu_mul_kernel`."""
    return {"BLOCK_F": min(BLOCK_F, triton.next_power_of_2(size)), "enable_fp_fusion": False}


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The Triton form of `torch_ops.rms_norm`, same arguments and result; the last dimension must be contiguous.

    Raises:
        ValueError: operands do not fit together, or the rows need more than two strides.
    """
    return _norm(x_TD, None, weight_D, eps)[0]


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The Triton form of `torch_ops.add_rms_norm`, same arguments and result.

    Raises:
        ValueError: operands do not fit together, or are not contiguous.
    """
    check_contiguous(x_TD=x_TD, residual_TD=residual_TD)
    if x_TD.shape != residual_TD.shape or x_TD.dtype != residual_TD.dtype:
        raise ValueError(f"residual_TD: {residual_TD.dtype} {tuple(residual_TD.shape)} must be those of x_TD")
    return _norm(x_TD, residual_TD, weight_D, eps, multiplier)


def _norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    size = x_TD.shape[-1]
    if weight_D.shape != (size,) or weight_D.dtype != x_TD.dtype:
        raise ValueError(f"weight_D: {weight_D.dtype} {tuple(weight_D.shape)} must be {x_TD.dtype} ({size},)")
    rows_THD = x_TD if x_TD.ndim == 3 else x_TD.reshape(-1, 1, size)
    if rows_THD.stride(-1) != 1 and rows_THD.numel():
        raise ValueError(f"x_TD: strides {x_TD.stride()} are not allowed; the last must be 1")
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    sum_TD = None if residual_TD is None else torch.empty_like(out_TD)
    num_heads = rows_THD.shape[1]
    num_rows = len(rows_THD) * num_heads
    if num_rows:
        meta = rms_norm_meta(size)
        rms_norm_kernel[(triton.cdiv(num_rows, meta["BLOCK_R"]),)](
            rows_THD,
            residual_TD,
            weight_D,
            out_TD,
            sum_TD,
            num_rows,
            num_heads,
            rows_THD.stride(0),
            rows_THD.stride(1),
            size,
            float(eps),
            float(multiplier),
            **meta,
        )
    return out_TD, out_TD if sum_TD is None else sum_TD


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """The Triton form of `torch_ops.silu_mul`, same argument and result.

    Raises:
        ValueError: the operand is not contiguous.
    """
    check_contiguous(gate_up_T2F=gate_up_T2F)
    size = gate_up_T2F.shape[-1] // 2
    out_TF = gate_up_T2F.new_empty(*gate_up_T2F.shape[:-1], size)
    if out_TF.numel():
        meta = silu_mul_meta(size)
        grid = (out_TF.numel() // size, triton.cdiv(size, meta["BLOCK_F"]))
        silu_mul_kernel[grid](gate_up_T2F, out_TF, size, **meta)
    return out_TF


def scale_rows(out_TD: Tensor, x_TD: Tensor, gate_D: Tensor) -> Tensor:
    """The Triton form of `torch_ops.scale_rows`, same arguments and result.

    Raises:
        ValueError: operands do not fit together, or are not contiguous.
    """
    check_contiguous(out_TD=out_TD, x_TD=x_TD, gate_D=gate_D)
    if out_TD.shape != x_TD.shape or gate_D.shape != x_TD.shape[1:]:
        raise ValueError(
            f"gate_D: {tuple(gate_D.shape)} and out_TD {tuple(out_TD.shape)} must fit x_TD {tuple(x_TD.shape)}"
        )
    scaled_TD = torch.empty_like(out_TD)
    num_rows, size = x_TD.shape
    if num_rows:
        scale_rows_kernel[(num_rows,)](x_TD, gate_D, out_TD, scaled_TD, size, **scale_rows_meta(size))
    return scaled_TD
