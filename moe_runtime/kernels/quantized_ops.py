"""The product of rows with a quantised matrix, in torch on any device.

`torch_ops.grouped_mlp` is that of experts, dense or quantised.

Shape suffixes: N rows, I and O input and output features.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.kernels.quantized_slots import Matrix, dense


def check_linear(x_NI: Tensor, weight_OI: Matrix) -> None:
    """Refuse rows and a matrix that do not fit together.

    Raises:
        ValueError: the operand, its shape or dtype and what is allowed.
    """
    if isinstance(weight_OI, Tensor):
        inputs, dtype = weight_OI.shape[1], weight_OI.dtype
    else:
        inputs, dtype = weight_OI.num_inputs, x_NI.dtype
    if x_NI.ndim != 2 or x_NI.shape[1] != inputs or x_NI.dtype != dtype:
        raise ValueError(f"x_NI: {x_NI.dtype} {tuple(x_NI.shape)} is not allowed; it must be {dtype} [rows, {inputs}]")


def quantized_linear(x_NI: Tensor, weight_OI: QuantizedMatrix, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, rounded once, `[N, O]`.

    The weights are decoded in float32 and rounded to the dtype of the rows (`quantized_slots.dense`).

    Raises:
        ValueError: shapes do not fit together.
    """
    check_linear(x_NI, weight_OI)
    return F.linear(x_NI, dense(weight_OI, x_NI.dtype), bias_O)
