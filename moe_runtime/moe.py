"""The sparse block: gate, dispatch, experts, combine. The one place that knows both logical experts and slots.

Shape suffixes: T tokens, D hidden, E logical experts, K experts per token, L sparse layers, W ranks, S slots per rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher
from moe_runtime.experts.slots import ExpertSlots
from moe_runtime.gate import Gate
from moe_runtime.layers import MLP


class ExpertCounter:
    """Tokens per (phase, sparse layer, logical expert) on this rank, counted on the device without a sync."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.counts_2LE = torch.zeros(2, num_layers, num_experts, dtype=torch.int64, device=device)

    def add(self, layer: int, experts_TK: Tensor, num_decode: int) -> None:
        """Count the choices of a step's tokens, of which the first `num_decode` are decode rows."""
        for phase, chosen in ((1, experts_TK[:num_decode]), (0, experts_TK[num_decode:])):
            if chosen.numel():
                ones = torch.ones_like(chosen).flatten()
                self.counts_2LE[phase, layer].scatter_add_(0, chosen.flatten(), ones)


class MoELayer:
    """A sparse block whose experts lie in slots on all ranks.

    Args:
        index: which sparse layer this is, for counting.
        gate: chooses logical experts.
        slot_E: the global slot (`rank * S + local slot`) of each logical expert.
        experts: this rank's slots.
        shared: the experts that every token uses, or None.
        dispatchers: by the name that a plan uses.
        counter: where choices are counted.
    """

    def __init__(
        self,
        index: int,
        gate: Gate,
        slot_E: Tensor,
        experts: ExpertSlots,
        shared: MLP | None,
        dispatchers: Mapping[str, Dispatcher],
        counter: ExpertCounter,
    ) -> None:
        self.index = index
        self.gate = gate
        self.slot_E = slot_E
        self.experts = experts
        self.shared = shared
        self.dispatchers = dispatchers
        self.counter = counter

    @property
    def nbytes(self) -> int:
        return self.gate.weight_ED.nbytes + self.experts.nbytes + (self.shared.nbytes if self.shared else 0)

    def __call__(self, x_TD: Tensor, dispatcher: str, tokens_per_rank: list[int], num_decode: int) -> Tensor:
        """`[T, D]`. All ranks call it for the same step, also one that has no token."""
        way = self.dispatchers[dispatcher]
        weights_TK, experts_TK = self.gate(x_TD)
        self.counter.add(self.index, experts_TK, num_decode)

        sent = way.dispatch(x_TD, self.slot_E[experts_TK], tokens_per_rank)
        y_RD = self.experts(sent.x_ND, sent.row_R, sent.counts_S)
        out_TD = way.combine(y_RD, sent, weights_TK)

        return out_TD if self.shared is None else out_TD + self.shared(x_TD)
