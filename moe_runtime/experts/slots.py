"""The experts' weights and biases of one layer on one rank, in slots.

Shape suffixes: S slots, D hidden, F expert intermediate, G = 2F (of gate, then of up), N rows, R computations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels.forms import USUAL, Forms
from moe_runtime.kernels.quantized_slots import Matrix, MatrixSlots, QuantizedSlots, empty_matrix, put_rows, tensors_of
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU
from moe_runtime.types.weight_format import DENSE, BlockFormats, WeightFormat


class ExpertSlots:
    """Room for S experts; a slot without weights must not be computed.

    Args:
        num_slots, hidden_size, intermediate_size: S, D, F.
        dtype, device: of the rows, of biases, and of weights that are not quantised.
        forms: of the products.
        swiglu: the activation.
        has_bias: whether the matrices have biases; they are zero until they are put in.
        formats: of the matrices.
    """

    def __init__(
        self,
        num_slots: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        device: torch.device,
        forms: Forms = USUAL,
        swiglu: SwiGLU = PLAIN,
        has_bias: bool = False,
        formats: BlockFormats = DENSE,
    ) -> None:
        self.forms = forms
        self.swiglu = swiglu
        dense = WeightFormat.of(str(dtype).removeprefix("torch."))
        self.formats = BlockFormats(formats.input or dense, formats.output or dense)

        def room(outputs: int, inputs: int, format: WeightFormat | None) -> MatrixSlots:
            if format is None:
                return torch.empty(num_slots, outputs, inputs, dtype=dtype, device=device)
            return QuantizedSlots(empty_matrix(format, num_slots * outputs, inputs, device), outputs)

        self.w13_SGD = room(2 * intermediate_size, hidden_size, formats.input)
        self.w2_SDF = room(hidden_size, intermediate_size, formats.output)
        self.b13_SG: Tensor | None = None
        self.b2_SD: Tensor | None = None
        if has_bias:
            self.b13_SG = torch.zeros(num_slots, 2 * intermediate_size, dtype=dtype, device=device)
            self.b2_SD = torch.zeros(num_slots, hidden_size, dtype=dtype, device=device)

    @property
    def num_slots(self) -> int:
        return len(self.w2_SDF)

    @property
    def nbytes(self) -> int:
        return sum(room.nbytes for room in self._rooms())

    def put(self, slot: int, part: ExpertPart, first_row: int, rows: Matrix) -> None:
        """Copy rows of one of an expert's matrices (gate and up `[F, D]`, down `[D, F]`) into a slot, or of its biases.

        Args:
            rows: `[n, inputs]` in the slots' format, or `[n]` of a bias, for the outputs from `first_row` on.
        """
        matrix, _, bias = part.partition("_")
        weights, biases = (self.w2_SDF, self.b2_SD) if matrix == "down" else (self.w13_SGD, self.b13_SG)
        room: MatrixSlots | None = biases if bias else weights
        assert room is not None, f"{part}: no room for biases"
        if matrix == "up":
            first_row += self.w2_SDF.shape[2]
        put_rows(room[slot], first_row, rows)

    def stored(self, slot: int) -> tuple[Tensor, ...]:
        """A slot's content as stored in memory; the same on every rank for the same expert."""
        return tuple(tensor for room in self._rooms() for tensor in tensors_of(room[slot]))

    def __call__(self, x_ND: Tensor, row_R: Tensor | None, counts_S: Tensor, room_RD: Tensor | None = None) -> Tensor:
        """The experts' outputs for the rows `x_ND[row_R]`, grouped by slot: `[R, D]` in that order.

        See `kernels.ops.grouped_mlp`.
        """
        return self.forms.grouped_mlp(
            x_ND,
            row_R,
            counts_S,
            self.w13_SGD,
            self.w2_SDF,
            b13_SG=self.b13_SG,
            b2_SD=self.b2_SD,
            swiglu=self.swiglu,
        )

    def _rooms(self) -> Iterator[MatrixSlots]:
        yield from (self.w13_SGD, self.w2_SDF)
        yield from (bias for bias in (self.b13_SG, self.b2_SD) if bias is not None)
