"""Matrices as products take them: dense or quantised, alone or in slots.

Shape suffixes: S slots, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.types.weight_format import WeightFormat

Matrix = Tensor | QuantizedMatrix  # [N, K]


@dataclass(frozen=True)
class QuantizedSlots:
    """A quantised matrix `[N, K]` in each of S slots, as `[S, N, K]` of a dense tensor.

    Attributes:
        matrix: `[S * N, K]`, the rows of slot after slot.
        num_outputs: N.
    """

    matrix: QuantizedMatrix
    num_outputs: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.matrix) // self.num_outputs, self.num_outputs, self.matrix.num_inputs

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, slot: int) -> QuantizedMatrix:
        """A view of a slot's matrix."""
        if not 0 <= slot < len(self):
            raise IndexError(f"slot: {slot} is not allowed; it must be from 0 to {len(self) - 1}")
        first = slot * self.num_outputs
        return self.matrix.rows(slice(first, first + self.num_outputs))


MatrixSlots = Tensor | QuantizedSlots  # [S, N, K]


def empty_matrix(format: WeightFormat, outputs: int, inputs: int, device: torch.device) -> QuantizedMatrix:
    """Room for a quantised matrix `[outputs, inputs]`, whose rows are put in afterwards."""
    assert format.scale is not None, format
    groups, factors = format.num_groups(inputs), format.num_factors(inputs)
    scale, factor = format.scale, format.scale.factor

    def room(count: int, dtype: str = "uint8") -> Tensor:
        return torch.empty(outputs, count, dtype=getattr(torch, dtype), device=device)

    return QuantizedMatrix(
        format,
        room(-(-inputs * format.code.bits // 8)),
        room(groups, scale.dtype),
        room(groups) if format.has_zero else None,
        room(factors, factor.dtype) if factor else None,
        inputs,
        room(groups, scale.dtype) if format.has_offset else None,
        room(factors, factor.dtype) if factor and format.has_offset else None,
    )


def tensors_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """All that a matrix is made of."""
    parts = (matrix,) if isinstance(matrix, Tensor) else matrix.parts
    return tuple(part for part in parts if part is not None)


def put_rows(matrix: Matrix, first_row: int, rows: Matrix) -> None:
    """Copy rows of the same format into a matrix, from `first_row` on."""
    if isinstance(matrix, QuantizedMatrix):
        assert isinstance(rows, QuantizedMatrix) and rows.format == matrix.format, (type(rows), matrix.format)
    for room, tensor in zip(tensors_of(matrix), tensors_of(rows), strict=True):
        room[first_row : first_row + len(rows)] = tensor


def dense(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The weights that a product of rows of this dtype takes, `[N, K]`.

    Quantised weights are decoded in float32 and rounded once, to the dtype of the rows.
    """
    return matrix if isinstance(matrix, Tensor) else matrix.dequantize().to(dtype)
