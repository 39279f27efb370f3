"""Products of quantised weights with rows in int8: the twin of `cpu/int8_rows.h`, which describes them.

Shape suffixes: T rows, N outputs, K inputs, B blocks of inputs, b inputs of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.kernels.quantized import SMALLEST_NORMAL, QuantizedMatrix
from moe_runtime.types.weight_format import Code, WeightFormat

MOST_BLOCK_INPUTS = 128


def block_inputs(format: WeightFormat) -> int:
    """Inputs of a row that share a scale: the most, up to 128, that divide the weight's groups."""
    if format.group is None:
        return MOST_BLOCK_INPUTS
    return next(size for size in range(min(format.group, MOST_BLOCK_INPUTS), 0, -8) if format.group % size == 0)


def quantize_rows(x_TK: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rows as integers from -127 to 127, `[T, B, b]` float32 with zeros at the end, and their scales `[T, B]`."""
    rows, inputs = x_TK.shape
    blocks = -(-inputs // block)
    x_TBb = torch.nn.functional.pad(x_TK.float(), (0, blocks * block - inputs)).view(rows, blocks, block)
    scale_TB = x_TBb.abs().amax(dim=2) / 127.0
    inverse_TB = torch.where(scale_TB >= SMALLEST_NORMAL, 1.0 / scale_TB, 0.0)
    return (x_TBb * inverse_TB[:, :, None]).round(), scale_TB


def linear_int8_rows(x_TK: Tensor, weight: QuantizedMatrix) -> Tensor:
    """`x @ weight.T`, float32 `[T, N]`, with x rounded to int8 in blocks."""
    assert weight.format.code is not Code.FP8
    block = block_inputs(weight.format)
    x_TBb, scale_TB = quantize_rows(x_TK, block)
    group, count = weight.format.group or weight.num_inputs, x_TBb.shape[1]
    padded = torch.nn.functional.pad(weight.values(), (0, count * block - weight.num_inputs))
    codes_NBb, scales_NG, offsets_NG = padded.view(len(weight), count, block), weight.scales(), weight.offsets()
    out_TN = torch.zeros(len(x_TK), len(weight))
    for index in range(count):
        sums_TN = (x_TBb[:, index].double() @ codes_NBb[:, index].double().T).float()  # exact
        scaled_TN = sums_TN * scales_NG[:, index * block // group]
        if offsets_NG is not None:
            scaled_TN += x_TBb[:, index].sum(dim=1)[:, None] * offsets_NG[:, index * block // group]
        out_TN = torch.addcmul(out_TN.double(), scaled_TN.double(), scale_TB[:, index, None].double()).float()
    return out_TN
