"""Which slots a rank's tokens take: tables worked out from the placement and the last counts, sent where they changed.

Shape suffixes: L MoE layers, W ranks, E logical experts, P entries of a table, S slots per rank.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.choice import quotas, replica_table, slots_by_rank
from moe_runtime.balancer.placement import Placement
from moe_runtime.balancer.split import split_tokens
from moe_runtime.messages import Route

ROUTE_LENGTH = 64


class Routes:
    """What every rank has been told, and what it must be told next.

    Args:
        placement: with which the ranks began; they send each expert's tokens to its first slot.
    """

    def __init__(self, placement: Placement) -> None:
        first_LEP = np.repeat(placement.first_slot[:, :, None], ROUTE_LENGTH, axis=2)
        self._told = [first_LEP.copy() for _ in range(placement.num_ranks)]
        self._news: list[list[Route]] = [[] for _ in range(placement.num_ranks)]
        self._worked_out = np.full_like(placement.slots, -2)  # the slots behind the tables

    def update(self, placement: Placement, counts_WLE: npt.NDArray[np.integer]) -> None:
        """Work the tables of layers anew that have changed or have replicas; what is new waits for the next plan.

        Args:
            counts_WLE: tokens that each rank has had for each expert of late.
        """
        has_changed_L = (placement.slots != self._worked_out).any(axis=(1, 2))
        has_replicas_L = (placement.hosts.sum(axis=1) > 1).any(axis=1)
        self._worked_out = placement.slots
        for layer in np.nonzero(has_changed_L | has_replicas_L)[0].tolist():
            slots_WS = placement.slots[layer]
            count_WE = counts_WLE[:, layer]
            share_EW = split_tokens(count_WE.sum(axis=0).astype(np.float64), slots_WS)
            slot_EW = slots_by_rank(slots_WS, placement.num_experts)
            for rank, told_LEP in enumerate(self._told):
                table_EP = replica_table(quotas(count_WE, share_EW, rank), share_EW, slot_EW, rank, ROUTE_LENGTH)
                for expert in np.nonzero((table_EP != told_LEP[layer]).any(axis=1))[0].tolist():
                    row = table_EP[expert].tolist()
                    slots = row if len(set(row)) > 1 else row[:1]
                    self._news[rank].append(Route(layer, expert, slots))
                told_LEP[layer] = table_EP

    def take_news(self) -> list[list[Route]] | None:
        """The routes that each rank must be told with the next plan; None if there are none."""
        if not any(self._news):
            return None
        news, self._news = self._news, [[] for _ in self._news]
        return news
