"""Packed weights: a linear map, and the experts of a layer.

bfloat16 weights are stored in 12 bits each, without loss; see `coded.h`. Quantised weights stay in their codes; see
`quantized.h`. C structs hold what does not change, so that a
call passes a few pointers. Shape suffixes are those of `native`.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Literal

import torch
from torch import Tensor

from moe_runtime.kernels.cpu import structs
from moe_runtime.kernels.cpu.native import Kernels, native_code, native_format
from moe_runtime.kernels.cpu.native_step import pointer
from moe_runtime.kernels.cpu.structs import QuantFormat, QuantSource, Weight
from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU
from moe_runtime.types.weight_format import DENSE, PANEL, BlockFormats, Code, WeightFormat

PackedPart = Literal["gate", "up", "down", "gate_bias", "up_bias", "down_bias"]


class PackedMatrices:
    """Room for weights `[outputs, inputs]`, packed one after another. Put in all rows of a weight before using it.

    Args:
        dtype: of activations.
        format: how the weights are stored, if they are quantised; None: as weights of `dtype`.
        int8_rows: products round rows to int8, see `int8_rows.h`; not with FP8.

    Attributes:
        format: how they are stored.
        data: uint8 `[copies, bytes]`.
        escapes: int64 `[copies, panels]`, addresses of the escape lists of bfloat16 panels; 0 for none. This object
            owns the lists.
        weight: the C struct.

    Raises:
        ValueError: a dtype that is neither float32 nor bfloat16.
    """

    def __init__(
        self,
        kernels: Kernels,
        dtype: torch.dtype,
        outputs: int,
        inputs: int,
        copies: int = 1,
        format: WeightFormat | None = None,
        int8_rows: bool = False,
    ) -> None:
        self.format = format or native_format(dtype)
        self.kernels, self.dtype = kernels, dtype
        self.outputs, self.inputs = outputs, inputs
        self._quant = quant_format(self.format, int8_rows) if self.format.is_quantized else None
        self._quant_address = None if self._quant is None else ctypes.addressof(self._quant)
        self.data = kernels.packed_empty(dtype, outputs, inputs, copies, self._quant_address)
        self.escapes = torch.zeros(copies, -(-outputs // PANEL), dtype=torch.int64)
        self.weight = Weight(self.data.data_ptr(), self.escapes.data_ptr(), outputs, inputs, self._quant_address)
        weakref.finalize(self, _free_escapes, kernels, self.escapes)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def put(self, copy: int, first_row: int, weight: Tensor | QuantizedMatrix) -> None:
        """Fill the outputs from `first_row` on, in whole panels; only the weight's last panel may lack rows.

        Args:
            weight: `[rows, inputs]` of `dtype`, or of the format if that is quantised.
        """
        assert first_row % PANEL == 0 and 0 <= first_row <= self.outputs - len(weight)
        if isinstance(weight, QuantizedMatrix):
            self._put_quantized(copy, first_row, weight)
        else:
            self._put_dense(copy, first_row, weight)

    def _put_quantized(self, copy: int, first_row: int, weight: QuantizedMatrix) -> None:
        assert weight.format == self.format and weight.num_inputs == self.inputs
        parts = [None if x is None else x.contiguous() for x in weight.parts]
        source = QuantSource(*(None if x is None else x.data_ptr() for x in parts))
        self.kernels.library.moe_pack_quantized(
            self._quant_address,
            ctypes.addressof(source),
            first_row // PANEL,
            len(weight),
            self.inputs,
            self.data[copy].data_ptr(),
        )

    def _put_dense(self, copy: int, first_row: int, weight_MD: Tensor) -> None:
        rows, inputs = weight_MD.shape
        assert not self.format.is_quantized and weight_MD.dtype == self.dtype and inputs == self.inputs
        assert weight_MD.stride(1) == 1 or inputs == 1
        self.kernels.library.moe_pack(
            self.format.code.native,
            weight_MD.data_ptr(),
            weight_MD.stride(0),
            first_row // PANEL,
            rows,
            inputs,
            self.data[copy].data_ptr(),
            self.escapes[copy].data_ptr(),
        )

    def unpack(self, copy: int, first_row: int, rows: int) -> Tensor:
        """The values of rows of a weight, `[rows, inputs]`."""
        out = torch.empty(rows, self.inputs, dtype=self.dtype)
        data, escapes, size = self.data[copy].data_ptr(), self.escapes[copy].data_ptr(), (first_row, rows, self.inputs)
        library, code = self.kernels.library, native_code(self.dtype)
        if self._quant_address is None:
            library.moe_unpack(code, data, escapes, *size, out.data_ptr())
        else:
            library.moe_unpack_quantized(code, self._quant_address, data, *size, out.data_ptr())
        return out

    def stored(self, copy: int) -> tuple[Tensor, Tensor]:
        """The stored form of a weight: its bytes in memory, and a copy of its escapes, int64 `[N]`."""
        panels = self.escapes[copy]
        listed = self.kernels.library.moe_list_escapes
        escapes = torch.empty(listed(panels.data_ptr(), len(panels), None), dtype=torch.int64)
        listed(panels.data_ptr(), len(panels), escapes.data_ptr())
        return self.data[copy], escapes


def quant_format(format: WeightFormat, int8_rows: bool) -> QuantFormat:
    """The C struct of a quantised format."""
    assert format.scale is not None
    takes_int8 = int8_rows and format.code is not Code.FP8
    term = 1 if format.has_zero else 2 if format.has_offset else 0  # as in quantized.h
    return QuantFormat(format.code.native, format.scale.native, term, takes_int8, format.group or 0)


def _free_escapes(kernels: Kernels, escapes: Tensor) -> None:
    kernels.library.moe_free_escapes(escapes.data_ptr(), escapes.numel())


class PackedLinear:
    """`x @ weight.T + bias` with the weight `[outputs, inputs]` packed.

    Args:
        bias: `[outputs]` in `dtype`, or None.
        format, int8_rows: see `PackedMatrices`.
    """

    def __init__(
        self,
        kernels: Kernels,
        outputs: int,
        inputs: int,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        format: WeightFormat | None = None,
        int8_rows: bool = False,
    ) -> None:
        assert bias is None or (bias.dtype == dtype and bias.shape == (outputs,))
        self.kernels, self.dtype = kernels, dtype
        self.outputs, self.inputs, self.bias = outputs, inputs, bias
        self.matrix = PackedMatrices(kernels, dtype, outputs, inputs, format=format, int8_rows=int8_rows)
        self.weight = self.matrix.weight
        self.format = self.matrix.format
        self.element = native_code(dtype)
        self._address = ctypes.addressof(self.weight)
        self._bias = pointer(bias)

    @classmethod
    def pack(cls, kernels: Kernels, weight_ND: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """Pack a whole weight."""
        packed = cls(kernels, weight_ND.shape[0], weight_ND.shape[1], weight_ND.dtype, bias)
        packed.put(0, weight_ND)
        return packed

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def put(self, first_row: int, weight: Tensor | QuantizedMatrix) -> None:
        """Fill the outputs from `first_row` on, in whole panels."""
        self.matrix.put(0, first_row, weight)

    def unpack(self) -> Tensor:
        """The weight `[outputs, inputs]`."""
        return self.matrix.unpack(0, 0, self.outputs)

    def take_rows(self, index_T: Tensor) -> Tensor:
        """`weight[index]`, `[T, inputs]`: the embedding of a model whose head is tied to it.

        Raises:
            ValueError: an index is out of range.
        """
        assert index_T.dtype == torch.int64 and index_T.ndim == 1 and not self.format.is_quantized
        out = torch.empty(len(index_T), self.inputs, dtype=self.dtype)
        taken = self.kernels.library.moe_take_rows(
            self.element, self._address, pointer(index_T), len(index_T), out.data_ptr()
        )
        if taken < len(index_T):
            raise ValueError(f"index: {int(index_T[taken])} is not allowed; it must be from 0 to {self.outputs - 1}")
        return out

    def __call__(self, x_TD: Tensor, *, float32: bool = False) -> Tensor:
        """`[T, outputs]` in the weight's dtype, or in float32, unrounded."""
        assert x_TD.dtype == self.dtype and x_TD.ndim == 2 and x_TD.shape[1] == self.inputs
        out = torch.empty(len(x_TD), self.outputs, dtype=torch.float32 if float32 else x_TD.dtype)
        self.kernels.library.moe_linear(
            self.element, float32, self._address, self._bias, pointer(x_TD), len(x_TD), out.data_ptr()
        )
        return out


class PackedExperts:
    """SwiGLU experts of one layer, packed, in slots; with one slot, a dense MLP. Fill a slot before its use.

    Args:
        gate_D: a row's output is multiplied by the sigmoid of its product with the gate; None: it is not.
        swiglu: the activation.
        has_bias: whether the projections have biases, which are zeros until they are put in.
        formats, int8_rows: of the matrices; see `PackedMatrices`.
    """

    def __init__(
        self,
        kernels: Kernels,
        num_slots: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        gate_D: Tensor | None = None,
        swiglu: SwiGLU = PLAIN,
        has_bias: bool = False,
        formats: BlockFormats = DENSE,
        int8_rows: bool = False,
    ) -> None:
        assert gate_D is None or (gate_D.dtype == dtype and gate_D.shape == (hidden_size,))
        self.kernels, self.dtype = kernels, dtype
        self.num_slots, self.hidden_size, self.intermediate_size = num_slots, hidden_size, intermediate_size
        # Gate and up projections each begin at a panel boundary.
        self._up_row = -(-intermediate_size // PANEL) * PANEL
        sizes = (2 * self._up_row, hidden_size), (hidden_size, intermediate_size)
        self.w13, self.w2 = (
            PackedMatrices(kernels, dtype, *size, num_slots, format, int8_rows)
            for size, format in zip(sizes, formats.all, strict=True)
        )
        b13 = torch.zeros(num_slots, 2 * self._up_row, dtype=dtype) if has_bias else None
        b2 = torch.zeros(num_slots, hidden_size, dtype=dtype) if has_bias else None
        self.experts = structs.ExpertsStruct(
            self.w13.weight,
            self.w2.weight,
            num_slots,
            hidden_size,
            intermediate_size,
            pointer(gate_D),
            pointer(b13),
            pointer(b2),
            structs.SwiGLUStruct(swiglu.alpha, swiglu.limit, swiglu.offset),
        )
        self.gate_D = gate_D
        self.b13, self.b2 = b13, b2
        self.address = ctypes.addressof(self.experts)
        self.formats = BlockFormats(self.w13.format, self.w2.format)
        self.element = native_code(dtype)

    @property
    def nbytes(self) -> int:
        vectors = (vector for vector in (self.b13, self.b2, self.gate_D) if vector is not None)
        return self.w13.nbytes + self.w2.nbytes + sum(vector.nbytes for vector in vectors)

    def put(self, slot: int, part: PackedPart, first_row: int, rows: Tensor | QuantizedMatrix) -> None:
        """Pack rows of one of an expert's matrices (gate and up `[F, D]`, down `[D, F]`) or biases into a slot.

        Pieces of a matrix are whole panels: only the last piece may have a number of rows that `PANEL` does not divide.
        """
        outputs = self.hidden_size if part.startswith("down") else self.intermediate_size
        assert first_row + len(rows) <= outputs and (first_row + len(rows) == outputs or len(rows) % PANEL == 0)
        if part.startswith("up"):
            first_row += self._up_row
        if part.endswith("bias"):
            bias = self.b2 if part == "down_bias" else self.b13
            assert bias is not None and isinstance(rows, Tensor)
            bias[slot, first_row : first_row + len(rows)] = rows
        else:
            (self.w2 if part == "down" else self.w13).put(slot, first_row, rows)

    def stored(self, slot: int) -> tuple[Tensor, ...]:
        """The stored content of a slot; the same on every rank for the same expert."""
        return (
            *self.w13.stored(slot),
            *self.w2.stored(slot),
            *(bias[slot] for bias in (self.b13, self.b2) if bias is not None),
        )

    def unpack(self, slot: int) -> tuple[Tensor, Tensor, Tensor]:
        """The values `(gate_FD, up_FD, down_DF)` of a slot."""
        gate, up = (self.w13.unpack(slot, row, self.intermediate_size) for row in (0, self._up_row))
        return gate, up, self.w2.unpack(slot, 0, self.hidden_size)

    def __call__(self, x_ND: Tensor, row_R: Tensor | None, counts_S: Tensor, room_RD: Tensor | None = None) -> Tensor:
        """See `torch_ops.grouped_mlp`; the product between the projections is rounded once.

        If `room_RD` is given, the result is in it.
        """
        assert x_ND.dtype == self.dtype and x_ND.ndim == 2 and x_ND.shape[1] == self.hidden_size
        assert counts_S.dtype == torch.int64 and len(counts_S) == self.num_slots
        assert row_R is None or row_R.dtype == torch.int64
        rows = len(x_ND) if row_R is None else len(row_R)
        y_RD = x_ND.new_empty(rows, self.hidden_size) if room_RD is None else room_RD
        assert y_RD.dtype == self.dtype and y_RD.shape == (rows, self.hidden_size) and y_RD.is_contiguous()
        self.kernels.library.moe_grouped_mlp(
            self.element,
            self.address,
            pointer(x_ND),
            len(x_ND),
            pointer(row_R),
            pointer(counts_S),
            y_RD.data_ptr(),
        )
        return y_RD
