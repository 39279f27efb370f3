"""The experts' weights of one layer on one rank, in slots.

Shape suffixes: S slots, D hidden, F expert intermediate, G = 2F (gate rows, then up rows), N rows, R computations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels.forms import USUAL, Forms
from moe_runtime.kernels.weight_format import WeightFormat


class ExpertSlots:
    """Room for S experts; a slot without weights must not be computed.

    Args:
        num_slots, hidden_size, intermediate_size: S, D, F.
        dtype, device: of the weights.
        forms: of the products.
    """

    def __init__(
        self,
        num_slots: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        device: torch.device,
        forms: Forms = USUAL,
    ) -> None:
        self.forms = forms
        self.format = WeightFormat.of(str(dtype).removeprefix("torch."))
        self.w13_SGD = torch.empty(num_slots, 2 * intermediate_size, hidden_size, dtype=dtype, device=device)
        self.w2_SDF = torch.empty(num_slots, hidden_size, intermediate_size, dtype=dtype, device=device)

    @property
    def num_slots(self) -> int:
        return len(self.w2_SDF)

    @property
    def nbytes(self) -> int:
        return self.w13_SGD.nbytes + self.w2_SDF.nbytes

    def put(self, slot: int, part: ExpertPart, first_row: int, rows: Tensor) -> None:
        """Copy rows of one of an expert's matrices (gate and up `[F, D]`, down `[D, F]`) into a slot."""
        inner = self.w2_SDF.shape[2]
        whole = {"gate": self.w13_SGD[slot, :inner], "up": self.w13_SGD[slot, inner:], "down": self.w2_SDF[slot]}[part]
        whole[first_row : first_row + len(rows)] = rows

    def stored(self, slot: int) -> tuple[Tensor, ...]:
        """A slot's content as stored in memory; the same on every rank for the same expert."""
        return self.w13_SGD[slot], self.w2_SDF[slot]

    def __call__(self, x_ND: Tensor, row_R: Tensor | None, counts_S: Tensor, room_RD: Tensor | None = None) -> Tensor:
        """`w2 @ (silu(gate @ x) * (up @ x))` of the rows `x_ND[row_R]`, grouped by slot: `[R, D]` in that order."""
        return self.forms.grouped_mlp(x_ND, row_R, counts_S, self.w13_SGD, self.w2_SDF)
