"""Random quantised matrices of every format."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.kernels.quantized_slots import QuantizedSlots
from moe_runtime.types.weight_format import Code, Scale, WeightFormat

# Those that weights can be quantised into.
QUANTIZABLE = [
    WeightFormat(Code.INT4, Scale.BFLOAT16, 32),
    WeightFormat(Code.INT4, Scale.FLOAT16, 128, has_zero=True),
    WeightFormat(Code.INT4, Scale.FLOAT32),
    WeightFormat(Code.INT8, Scale.FLOAT16, 32),
    WeightFormat(Code.INT8, Scale.BFLOAT16, 64, has_zero=True),
    WeightFormat(Code.INT8, Scale.FLOAT32),
    WeightFormat(Code.FP8, Scale.FLOAT32, 128),
    WeightFormat(Code.FP8, Scale.BFLOAT16),
    WeightFormat(Code.FP4, Scale.E8M0, 32),
    WeightFormat(Code.FP4, Scale.E4M3, 16),
]
FORMATS = [
    *QUANTIZABLE,
    WeightFormat(Code.UINT4, Scale.FLOAT16, 32, has_offset=True),
    WeightFormat(Code.UINT4, Scale.INT8, 32, has_offset=True),
    WeightFormat(Code.INT8, Scale.INT8, 32, has_offset=True),
    WeightFormat(Code.INT8, Scale.INT8, 16),
]


def name_of(format: WeightFormat) -> str:
    """A test's name for a format."""
    scale = "" if format.scale is None else format.scale.name
    term = " zeros" if format.has_zero else " offsets" if format.has_offset else ""
    return f"{format.name} {scale}{term}".replace(" ", "-")


def random_matrix(format: WeightFormat, outputs: int, inputs: int) -> QuantizedMatrix:
    """Every code and zero may occur, but for FP8's NaN; weights are of the size 1 / sqrt(inputs)."""
    assert format.scale is not None
    codes = torch.randint(0, 256, (outputs, -(-inputs * format.code.bits // 8)), dtype=torch.uint8)
    if format.code is Code.FP8:
        codes[codes & 127 == 127] = 0
    if format.code is Code.INT8 and format.has_offset:
        codes &= 31
    if inputs % 2 and format.code.bits == 4:
        codes[:, -1] &= 15
    shape = (outputs, format.num_groups(inputs))
    size = inputs**-0.5 * {Code.INT4: 0.2, Code.UINT4: 0.1, Code.INT8: 0.01, Code.FP8: 0.01, Code.FP4: 0.3}[format.code]
    zeros = torch.randint(0, 256, shape, dtype=torch.uint8) & 2**format.code.bits - 1 if format.has_zero else None
    scales, factors = random_scales(format, outputs, inputs, size)
    offsets, offset_factors = random_scales(format, outputs, inputs, -8 * size) if format.has_offset else (None, None)
    return QuantizedMatrix(format, codes, scales, zeros, factors, inputs, offsets, offset_factors)


def random_scales(format: WeightFormat, outputs: int, inputs: int, size: float) -> tuple[Tensor, Tensor | None]:
    """Scales or offsets of about this size, and their factors."""
    assert format.scale is not None
    shape, factors = (outputs, format.num_groups(inputs)), (outputs, format.num_factors(inputs))
    match format.scale:
        case Scale.E8M0:
            return torch.randint(120, 125, shape, dtype=torch.uint8), None
        case Scale.E4M3:
            return (0.01 + 400 * torch.rand(shape)).to(torch.float8_e4m3fn), size / 200 * (0.5 + torch.rand(factors))
        case Scale.INT8:
            return torch.randint(-128, 128, shape, dtype=torch.int8), (size / 64 * (0.5 + torch.rand(factors))).half()
        case scale:
            return (size * (0.5 + torch.rand(shape))).to(getattr(torch, scale.dtype)), None


def random_slots(format: WeightFormat, num_slots: int, outputs: int, inputs: int) -> QuantizedSlots:
    """A random matrix in each slot."""
    return QuantizedSlots(random_matrix(format, num_slots * outputs, inputs), outputs)
