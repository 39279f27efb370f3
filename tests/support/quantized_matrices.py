"""Random quantised matrices of every format."""

from __future__ import annotations

import torch

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.kernels.quantized_slots import QuantizedSlots
from moe_runtime.types.weight_format import Code, Scale, WeightFormat

FORMATS = [
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


def name_of(format: WeightFormat) -> str:
    """A test's name for a format."""
    scale = "" if format.scale is None else format.scale.name
    return f"{format.name} {scale}{' zeros' if format.has_zero else ''}".replace(" ", "-")


def random_matrix(format: WeightFormat, outputs: int, inputs: int) -> QuantizedMatrix:
    """Every code and zero may occur, but for FP8's NaN; weights are of the size 1 / sqrt(inputs)."""
    assert format.scale is not None
    codes = torch.randint(0, 256, (outputs, -(-inputs * format.code.bits // 8)), dtype=torch.uint8)
    if format.code is Code.FP8:
        codes[codes & 127 == 127] = 0
    if inputs % 2 and format.code.bits == 4:
        codes[:, -1] &= 15
    shape = (outputs, format.num_groups(inputs))
    size = inputs**-0.5 * {Code.INT4: 0.2, Code.INT8: 0.01, Code.FP8: 0.01, Code.FP4: 0.3}[format.code]
    factor = None
    if format.scale is Scale.E8M0:
        scales = torch.randint(120, 125, shape, dtype=torch.uint8)
    elif format.scale is Scale.E4M3:
        scales = (0.01 + 400 * torch.rand(shape)).to(torch.float8_e4m3fn)
        factor = size / 200 * (0.5 + torch.rand(outputs))
    else:
        scales = (size * (0.5 + torch.rand(shape))).to(getattr(torch, format.scale.dtype))
    zeros = torch.randint(0, 256, shape, dtype=torch.uint8) & 2**format.code.bits - 1 if format.has_zero else None
    return QuantizedMatrix(format, codes, scales, zeros, factor, inputs)


def random_slots(format: WeightFormat, num_slots: int, outputs: int, inputs: int) -> QuantizedSlots:
    """A random matrix in each slot."""
    return QuantizedSlots(random_matrix(format, num_slots * outputs, inputs), outputs)
