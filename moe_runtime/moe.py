"""The sparse block: gate, dispatch, experts, combine. The one place that knows both logical experts and slots.

Shape suffixes: T tokens, D hidden, E logical experts, K experts per token, L sparse layers, W ranks, S slots per rank,
R computations, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher
from moe_runtime.batch import Batch


class Router(Protocol):
    """Chooses logical experts, and counts them."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x_TD: Tensor, num_decode: int) -> tuple[Tensor, Tensor]:
        """`(weights_TK float32, experts_TK int64)`, best expert first; the first `num_decode` rows are decode rows."""


class Experts(Protocol):
    """This rank's slots of a layer."""

    @property
    def nbytes(self) -> int: ...

    def load(self, slot: int, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> None:
        """Copy an expert into a slot."""

    def __call__(self, x_ND: Tensor, row_R: Tensor | None, counts_S: Tensor) -> Tensor:
        """The experts' rows `[R, D]` of `x_ND[row_R]`, which is grouped by slot."""


class Shared(Protocol):
    """The experts that every token uses, as one MLP."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x_TD: Tensor) -> Tensor: ...


class Norm(Protocol):
    """The norm behind a block."""

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `residual + x`, and that sum."""


class ExpertCounter:
    """Tokens per (phase, sparse layer, logical expert) on this rank, counted on the device without a sync."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.counts_2LE = torch.zeros(2, num_layers, num_experts, dtype=torch.int64, device=device)

    def layer(self, index: int) -> Tensor:
        """The counts `[2, E]` of one sparse layer, prefill then decode; whoever routes adds to them."""
        return self.counts_2LE[:, index]


class MoELayer:
    """A sparse block whose experts lie in slots on all ranks, and the norm behind it.

    Args:
        gate: chooses logical experts.
        slot_E: the global slot (`rank * S + local slot`) of each logical expert.
        experts: this rank's slots.
        shared: the experts that every token uses, or None.
        next_norm: the norm behind.
        dispatchers: by the name that a plan uses.
    """

    def __init__(
        self,
        gate: Router,
        slot_E: Tensor,
        experts: Experts,
        shared: Shared | None,
        next_norm: Norm,
        dispatchers: Mapping[str, Dispatcher],
    ) -> None:
        self.gate = gate
        self.slot_E = slot_E
        self.experts = experts
        self.shared = shared
        self.next_norm = next_norm
        self.dispatchers = dispatchers

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.experts.nbytes + (self.shared.nbytes if self.shared else 0)

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The normed rows and the residual rows. All ranks call it for the same step, also one that has no token."""
        way = self.dispatchers[batch.dispatcher]
        weights_TK, experts_TK = self.gate(x_TD, batch.num_decode)

        sent = way.dispatch(x_TD, self.slot_E[experts_TK], batch.tokens_per_rank)
        y_RD = self.experts(sent.x_ND, sent.row_R, sent.counts_S)
        out_TD = way.combine(y_RD, sent, weights_TK)

        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD)
        return self.next_norm.add(out_TD, residual_TD)
