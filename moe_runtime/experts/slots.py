"""The experts' weights of one layer on one rank, in slots.

Shape suffixes: S slots, D hidden, F expert intermediate, G = 2F (gate rows, then up rows), N rows, R computations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.kernels import ops


class ExpertSlots:
    """Room for S experts; a slot that was never loaded must not be computed.

    Args:
        num_slots, hidden_size, intermediate_size: S, D, F.
        dtype, device: of the weights.
    """

    def __init__(
        self, num_slots: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.w13_SGD = torch.empty(num_slots, 2 * intermediate_size, hidden_size, dtype=dtype, device=device)
        self.w2_SDF = torch.empty(num_slots, hidden_size, intermediate_size, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.w13_SGD.nbytes + self.w2_SDF.nbytes

    def load(self, slot: int, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> None:
        """Copy an expert into a slot."""
        self.w13_SGD[slot, : len(gate_FD)] = gate_FD
        self.w13_SGD[slot, len(gate_FD) :] = up_FD
        self.w2_SDF[slot] = down_DF

    def __call__(self, x_ND: Tensor, row_R: Tensor | None, counts_S: Tensor) -> Tensor:
        """`w2 @ (silu(gate @ x) * (up @ x))` of the rows `x_ND[row_R]`, grouped by slot: `[R, D]` in that order."""
        return ops.grouped_mlp(x_ND, row_R, counts_S, self.w13_SGD, self.w2_SDF)
