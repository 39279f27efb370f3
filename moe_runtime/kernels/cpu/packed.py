"""Packed weights: a linear map, and the experts of a layer.

Their C structs hold what does not change, so that a call passes a few pointers. Shape suffixes are those of `native`.
"""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import Tensor

from moe_runtime.kernels.cpu import structs
from moe_runtime.kernels.cpu.native import Kernels, is_bf16, pointer
from moe_runtime.kernels.cpu.structs import Weight

PANEL = 64  # outputs of a panel; gate and up projections of experts begin at one


class PackedLinear:
    """`x @ weight.T + bias` with the weight `[outputs, inputs]` packed. Rows are loaded piece by piece.

    Args:
        bias: `[outputs]` in `dtype`, or None.
    """

    def __init__(
        self, kernels: Kernels, outputs: int, inputs: int, dtype: torch.dtype, bias: Tensor | None = None
    ) -> None:
        assert bias is None or (bias.dtype == dtype and bias.shape == (outputs,))
        self.kernels = kernels
        self.outputs, self.inputs, self.bias = outputs, inputs, bias
        self.packed = kernels.packed_empty(dtype, outputs, inputs)
        self.weight = Weight(self.packed.data_ptr(), outputs, inputs)
        self._is_bf16 = is_bf16(self.packed)
        self._address = ctypes.addressof(self.weight)
        self._bias = pointer(bias)

    @classmethod
    def pack(cls, kernels: Kernels, weight_ND: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """Pack a whole weight."""
        packed = cls(kernels, weight_ND.shape[0], weight_ND.shape[1], weight_ND.dtype, bias)
        packed.load(0, weight_ND)
        return packed

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def load(self, first_row: int, weight_MD: Tensor) -> None:
        """Fill the outputs from `first_row` on."""
        rows, inputs = weight_MD.shape
        assert inputs == self.inputs and 0 <= first_row <= self.outputs - rows
        _pack(self.kernels, weight_MD, first_row, self.packed)

    def unpack(self) -> Tensor:
        """The weight `[outputs, inputs]`."""
        return _unpack(self.kernels, self.packed, 0, self.outputs, self.inputs)

    def take_rows(self, index_T: Tensor) -> Tensor:
        """`weight[index]`, `[T, inputs]`: the embedding of a model whose head is tied to it.

        Raises:
            ValueError: an index is not a row.
        """
        assert index_T.dtype == torch.int64 and index_T.ndim == 1
        if len(index_T) and not 0 <= int(index_T.min()) <= int(index_T.max()) < self.outputs:
            raise ValueError(f"index: {index_T.tolist()} is not allowed; it must be from 0 to {self.outputs - 1}")
        out = torch.empty(len(index_T), self.inputs, dtype=self.packed.dtype)
        self.kernels.library.moe_take_rows(self._is_bf16, self._address, pointer(index_T), len(index_T), out.data_ptr())
        return out

    def __call__(self, x_TD: Tensor, *, float32: bool = False) -> Tensor:
        """`[T, outputs]` in the weight's dtype, or in float32, unrounded."""
        assert x_TD.dtype == self.packed.dtype and x_TD.ndim == 2 and x_TD.shape[1] == self.inputs
        out = torch.empty(len(x_TD), self.outputs, dtype=torch.float32 if float32 else x_TD.dtype)
        self.kernels.library.moe_linear(
            self._is_bf16, float32, self._address, self._bias, pointer(x_TD), len(x_TD), out.data_ptr()
        )
        return out


class PackedExperts:
    """SwiGLU experts of one layer, packed, in slots; with one slot, a dense MLP. Load a slot before its use."""

    def __init__(
        self, kernels: Kernels, num_slots: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype
    ) -> None:
        self.kernels = kernels
        self.num_slots, self.hidden_size, self.intermediate_size = num_slots, hidden_size, intermediate_size
        self._up_row = -(-intermediate_size // PANEL) * PANEL
        whole = intermediate_size == self._up_row
        self.w13 = kernels.packed_empty(dtype, 2 * self._up_row, hidden_size, num_slots)
        if not whole:
            self.w13.zero_()
        self.w2 = kernels.packed_empty(dtype, hidden_size, intermediate_size, num_slots)
        self.experts = structs.Experts(
            self.w13.data_ptr(), self.w2.data_ptr(), num_slots, hidden_size, intermediate_size
        )
        self.address = ctypes.addressof(self.experts)
        self._is_bf16 = is_bf16(self.w13)

    @property
    def nbytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes

    def load(self, slot: int, part: Literal["gate", "up", "down"], first_row: int, rows: Tensor) -> None:
        """Pack rows of one of an expert's matrices (gate and up `[F, D]`, down `[D, F]`) into a slot."""
        inner, hidden = self.intermediate_size, self.hidden_size
        outputs, inputs = (hidden, inner) if part == "down" else (inner, hidden)
        assert rows.shape[1] == inputs and 0 <= first_row <= outputs - len(rows)
        packed = self.w2[slot] if part == "down" else self.w13[slot]
        _pack(self.kernels, rows, first_row + (self._up_row if part == "up" else 0), packed)

    def stored(self, slot: int) -> tuple[Tensor, ...]:
        """What a slot holds, as it lies in memory; the same on every rank for the same expert."""
        return self.w13[slot], self.w2[slot]

    def unpack(self, slot: int) -> tuple[Tensor, Tensor, Tensor]:
        """`(gate_FD, up_FD, down_DF)` of a slot."""
        inner, hidden = self.intermediate_size, self.hidden_size
        gate, up = (_unpack(self.kernels, self.w13[slot], row, inner, hidden) for row in (0, self._up_row))
        return gate, up, _unpack(self.kernels, self.w2[slot], 0, hidden, inner)

    def __call__(self, x_ND: Tensor, row_R: Tensor | None, counts_S: Tensor) -> Tensor:
        """See `torch_ops.grouped_mlp`; the product between the projections is rounded once."""
        assert x_ND.dtype == self.w13.dtype and x_ND.ndim == 2 and x_ND.shape[1] == self.hidden_size
        assert counts_S.dtype == torch.int64 and len(counts_S) == self.num_slots
        assert row_R is None or row_R.dtype == torch.int64
        rows = len(x_ND) if row_R is None else len(row_R)
        y_RD = x_ND.new_empty(rows, self.hidden_size)
        self.kernels.library.moe_grouped_mlp(
            self._is_bf16, self.address, pointer(x_ND), len(x_ND), pointer(row_R), pointer(counts_S), y_RD.data_ptr()
        )
        return y_RD


def _pack(kernels: Kernels, source: Tensor, first_row: int, packed: Tensor) -> None:
    assert source.dtype == packed.dtype and (source.stride(1) == 1 or source.shape[1] == 1)
    rows, inputs = source.shape
    kernels.library.moe_pack(
        is_bf16(source), source.data_ptr(), source.stride(0), first_row, rows, inputs, packed.data_ptr()
    )


def _unpack(kernels: Kernels, packed: Tensor, first_row: int, rows: int, inputs: int) -> Tensor:
    out = torch.empty(rows, inputs, dtype=packed.dtype)
    kernels.library.moe_unpack(is_bf16(packed), packed.data_ptr(), first_row, rows, inputs, out.data_ptr())
    return out
