"""Quantised weights in the products of `grouped_gemm` and `dense_gemm`, which read codes in place of weights.

A program decodes its tile of weights in registers as `quantized.QuantizedMatrix.dequantize` does, in float32. The
product rounds them once, to the dtype of the rows. So results differ from those of the dequantised matrix only by the
order of sums.

FP8, FP4 and E4M3 are decoded by integer arithmetic, because older chips have no instruction for them. Exponent and
mantissa are put in the place of a float16's. That gives the value times a power of two, and is right for subnormal
numbers too.

Shape suffixes: N and K as in `grouped_gemm`, W bytes of a tile's row, G runs of U inputs, each with one scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels import quantized
from moe_runtime.kernels.quantized_slots import Matrix, MatrixSlots, QuantizedSlots
from moe_runtime.kernels.torch_ops import check_contiguous
from moe_runtime.types.weight_format import SUPER_GROUP, Scale, WeightFormat

Meta = dict[str, int | float | str]  # constants and launch options of a kernel
INT4_ZERO = tl.constexpr(quantized.INT4_ZERO)


@triton.jit  # type: ignore[untyped-decorator]
def decode_e4m3(code: tl.tensor) -> tl.tensor:
    """E4M3 in float32: 4 bits of exponent with bias 7, 3 of mantissa; 0x7F is NaN."""
    bits = code.to(tl.int32)
    half = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit  # type: ignore[untyped-decorator]
def decode(code: tl.tensor, CODE: tl.constexpr) -> tl.tensor:
    """What codes stand for before zeros and scales, in float32; see `quantized.decode_codes`."""
    if CODE == "INT8":
        value = code.to(tl.int8, bitcast=True).to(tl.float32)
    elif CODE == "FP8":
        value = decode_e4m3(code)
    elif CODE == "INT4":
        value = (code.to(tl.int32) - INT4_ZERO).to(tl.float32)
    elif CODE == "UINT4":
        value = code.to(tl.float32)
    else:
        tl.static_assert(CODE == "FP4")  # E2M1: 2 bits of exponent with bias 1, 1 of mantissa
        bits = code.to(tl.int32)
        half = ((bits & 8) << 12 | (bits & 7) << 9).to(tl.uint16).to(tl.float16, bitcast=True)
        value = half.to(tl.float32) * 16384.0
    return value


@triton.jit  # type: ignore[untyped-decorator]
def decode_scale(scale: tl.tensor, SCALE: tl.constexpr) -> tl.tensor:
    """Scales in float32; see `quantized.decode_scales`."""
    if SCALE == "E8M0":
        value = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif SCALE == "E4M3":
        value = decode_e4m3(scale)
    else:
        value = scale.to(tl.float32)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def load_weights(
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    offset_factor_ptr: tl.tensor,
    w_row_N: tl.tensor,
    start: tl.tensor,
    in_features: tl.tensor,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    SUPER_GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The weights of rows `w_row_N` (int64) and inputs from `start` on, `[BLOCK_N, BLOCK_K]` float32.

    Pointers are `None` to what a format does not have. Inputs beyond the last get any finite numbers.
    """
    PER_BYTE: tl.constexpr = 1 if CODE == "INT8" or CODE == "FP8" else 2
    BLOCK_G: tl.constexpr = BLOCK_K // UNIT
    BLOCK_W: tl.constexpr = BLOCK_K // PER_BYTE
    # Written as products, from which the compiler sees that whole tiles are aligned.
    num_bytes = in_features // BLOCK_K * BLOCK_W if EVEN_K else tl.cdiv(in_features, PER_BYTE)
    num_groups = tl.cdiv(in_features, GROUP)
    byte_W = start // BLOCK_K * BLOCK_W + tl.arange(0, BLOCK_W)
    codes_ptr_NW = codes_ptr + w_row_N[:, None] * num_bytes + byte_W[None, :]
    is_byte_1W = (byte_W < num_bytes)[None, :]
    codes_NW = tl.load(codes_ptr_NW) if EVEN_K else tl.load(codes_ptr_NW, mask=is_byte_1W, other=0)
    codes_NK = tl.reshape(tl.join(codes_NW & 15, codes_NW >> 4), (BLOCK_N, BLOCK_K)) if PER_BYTE == 2 else codes_NW
    w_NGU = tl.reshape(decode(codes_NK, CODE), (BLOCK_N, BLOCK_G, UNIT))
    group_G = tl.minimum((start + tl.arange(0, BLOCK_G) * UNIT) // GROUP, num_groups - 1)
    group_NG = w_row_N[:, None] * num_groups + group_G[None, :]
    if zeros_ptr is not None:
        w_NGU -= decode(tl.load(zeros_ptr + group_NG), CODE)[:, :, None]
    factor_N = w_row_N
    if SUPER_GROUP is not None:  # a tile's inputs lie within one
        factor_N = w_row_N * tl.cdiv(in_features, SUPER_GROUP) + start // SUPER_GROUP
    scale_NG = decode_scale(tl.load(scales_ptr + group_NG), SCALE)
    if factor_ptr is not None:
        scale_NG *= tl.load(factor_ptr + factor_N).to(tl.float32)[:, None]
    w_NGU *= scale_NG[:, :, None]
    if offsets_ptr is not None:
        offset_NG = decode_scale(tl.load(offsets_ptr + group_NG), SCALE)
        if offset_factor_ptr is not None:
            offset_NG *= tl.load(offset_factor_ptr + factor_N).to(tl.float32)[:, None]
        w_NGU += offset_NG[:, :, None]
    return tl.reshape(w_NGU, (BLOCK_N, BLOCK_K))


def code_meta(format: WeightFormat | None, in_features: int, block_k: int) -> Meta:
    """Constants of a kernel that takes weights of a quantised format; none for dense weights, whose format is None."""
    if format is None:
        return {}
    assert format.scale is not None
    assert SUPER_GROUP % block_k == 0
    return {
        "CODE": format.code.name,
        "SCALE": format.scale.name,
        "GROUP": format.group or in_features,
        "UNIT": math.gcd(format.group or block_k, block_k),
        **({"SUPER_GROUP": SUPER_GROUP} if format.scale is Scale.INT8 else {}),
    }


@dataclass(frozen=True)
class WeightOperands:
    """Weights as kernels take them.

    Attributes:
        tensors: weights or codes, then scales, zeros, factors, offsets and their factors, or None.
        format: of quantised weights, or None.
    """

    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    format: WeightFormat | None


def weight_operands(name: str, weights: Matrix | MatrixSlots) -> WeightOperands:
    """Weights as kernels take them; `name` is for errors.

    Raises:
        ValueError: one of their tensors is not contiguous.
    """
    if isinstance(weights, Tensor):
        check_contiguous(**{name: weights})
        return WeightOperands((weights, None, None, None, None, None), None)
    matrix = weights.matrix if isinstance(weights, QuantizedSlots) else weights
    codes, scales, *_ = matrix.parts
    names = ("codes", "scales", "zeros", "factors", "offsets", "factors of offsets")
    parts = dict(zip(names, matrix.parts, strict=True))
    check_contiguous(**{f"{part} of {name}": tensor for part, tensor in parts.items()})
    if matrix.format.scale is Scale.E4M3:
        scales = scales.view(torch.uint8)  # the kernel decodes them
    return WeightOperands((codes, scales, *matrix.parts[2:]), matrix.format)
