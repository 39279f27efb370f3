"""Rows of a quantised matrix in a checkpoint, and the parts that formats have in common.

Shape suffixes: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.types.weight_format import WeightFormat
from moe_runtime.weights.checkpoint import ALL_ROWS, READABLE, Checkpoint
from moe_runtime.weights.scheme import part_name

BYTES = {"U8": torch.uint8}
E8M0 = BYTES | {"F8_E8M0": torch.uint8}
E4M3 = {"F8_E4M3": torch.float8_e4m3fn}
WORDS = {"I32": torch.int32}


@dataclass(frozen=True)
class StoredRows:
    """Some rows of a matrix.

    Attributes:
        name: of the plain tensor.
        shape: (outputs, inputs), or (entries, outputs, inputs) with an `index` that picks one.
        first, end: the rows.
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]
    index: int | None
    first: int
    end: int

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], index: int | None, rows: slice
    ) -> StoredRows:
        """Rows as `WeightSource.read` names them."""
        first, end, _ = rows.indices(shape[-2])
        return cls(checkpoint, name, shape, index, first, end)

    @property
    def num_outputs(self) -> int:
        return self.shape[-2]

    @property
    def num_inputs(self) -> int:
        return self.shape[-1]

    def has(self, part: str) -> bool:
        return self.checkpoint.has(part_name(self.name, part))

    def read(self, part: str, dtypes: Mapping[str, torch.dtype], *shape: int, rows: slice | None = None) -> Tensor:
        """A part of the matrix, which must have this shape: the rows that are wanted of the matrix, or `rows`."""
        rows = slice(self.first, self.end) if rows is None else rows
        name = part_name(self.name, part)
        return self.checkpoint.read_stored(name, dtypes, (*self.shape[:-2], *shape), self.index, rows)

    def read_scales(
        self, part: str, dtypes: Mapping[str, torch.dtype], format: WeightFormat, block_rows: int = 1
    ) -> Tensor:
        """Scales `[rows, G]` as they are stored: of the whole matrix, of each output, or of blocks."""
        if format.group is None and block_rows == 1:
            return self._row_scales(part, dtypes)
        shape = -(-self.num_outputs // block_rows), format.num_groups(self.num_inputs)
        found = self.read(part, dtypes, *shape, rows=slice(self.first // block_rows, -(-self.end // block_rows)))
        start = self.first % block_rows
        return found.repeat_interleave(block_rows, 0)[start : start + self.end - self.first]

    def read_number(self, part: str) -> float:
        """A float32 of the whole matrix."""
        shape = self._shape_of(part)
        shape = shape if math.prod(shape) == 1 else (1,)
        return float(self.read(part, READABLE, *shape, rows=ALL_ROWS))

    def _row_scales(self, part: str, dtypes: Mapping[str, torch.dtype]) -> Tensor:
        shape = self._shape_of(part)
        if math.prod(shape) == 1:
            whole = self.read(part, dtypes, *shape, rows=ALL_ROWS)
            return whole.view(1, 1).repeat(self.end - self.first, 1)
        shape = shape if shape == (self.num_outputs,) else (self.num_outputs, 1)
        return self.read(part, dtypes, *shape).view(-1, 1)

    def _shape_of(self, part: str) -> tuple[int, ...]:
        return self.checkpoint.stored(part_name(self.name, part)).shape[len(self.shape) - 2 :]


def as_bytes(words: Tensor) -> Tensor:
    """The bytes of int32 `[..., W]`, uint8 `[..., 4 * W]`. A clone has strides that can be viewed, also if W is 1."""
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The numbers in int32 `[..., W]`, low bits first, as uint8 `[..., W * 32 / bits]`."""
    content = as_bytes(words)
    return content if bits == 8 else torch.stack((content & 15, content >> 4), dim=-1).flatten(-2)


def signed(content: Tensor, bits: int) -> Tensor:
    """Integers from 0 as `QuantizedMatrix` has them: those of 8 bits less 128, in two's complement."""
    return content ^ 128 if bits == 8 else content
