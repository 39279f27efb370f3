"""Which experts of a layer move together, so that every expert always has a slot. No torch.

Shape suffixes: W ranks, S slots per rank, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.placement import EMPTY

Change = tuple[int, int, int]  # rank, expert that arrives, expert that leaves; EMPTY for none


def next_round(
    slots_WS: npt.NDArray[np.integer], wanted_WE: npt.NDArray[np.bool_], num_slots_W: Sequence[int]
) -> list[Change] | None:
    """The changes of the next migration round towards `wanted_WE`; None if no change is left, or none is possible.

    On each rank at most one expert arrives, into an empty slot, and at most one leaves. Afterwards the rank has an
    empty slot again. An expert leaves a rank only if another rank keeps it or gets it in the same round. So experts
    that change places move together. Experts that only leave do so in a separate round at the end.

    Args:
        slots_WS: the expert in each slot, EMPTY for none.
        wanted_WE: which rank must hold which expert; every expert has at least one rank.
        num_slots_W: slots of each rank, at least one more than the experts that it holds or must hold.
    """
    return _RoundPlanner(slots_WS, wanted_WE, num_slots_W).plan()


class _RoundPlanner:
    def __init__(
        self, slots_WS: npt.NDArray[np.integer], wanted_WE: npt.NDArray[np.bool_], num_slots_W: Sequence[int]
    ) -> None:
        self.holds = [set(row[row != EMPTY].tolist()) for row in slots_WS]
        self.num_empty = [count - len(held) for count, held in zip(num_slots_W, self.holds, strict=True)]
        wanted = [set(np.nonzero(row)[0].tolist()) for row in wanted_WE]
        self.coming = [sorted(want - held) for want, held in zip(wanted, self.holds, strict=True)]
        self.leaving = [sorted(held - want) for want, held in zip(wanted, self.holds, strict=True)]
        self.changes: dict[int, tuple[int, int]] = {}  # rank -> expert that arrives, expert that leaves

    def plan(self) -> list[Change] | None:
        for rank, experts in enumerate(self.coming):
            for expert in experts:
                if rank in self.changes or self._bring(rank, expert):
                    break
        if not self.changes and not any(self.coming):
            self._clear()
        return [(rank, *change) for rank, change in sorted(self.changes.items())] or None

    def _bring(self, rank: int, expert: int) -> bool:
        """Plan the arrival of an expert on a rank, and the changes elsewhere that it needs; False if impossible."""
        if rank in self.changes:
            return self.changes[rank][0] == expert
        before = dict(self.changes)
        if self.num_empty[rank] > 1:
            self.changes[rank] = (expert, EMPTY)
            return True
        for gone in self.leaving[rank]:
            self.changes[rank] = (expert, gone)
            if self._is_kept(gone) or self._bring_elsewhere(gone):
                return True
            self.changes = dict(before)
        return False

    def _is_kept(self, expert: int) -> bool:
        """Whether some rank has the expert after the changes planned so far."""
        for rank, held in enumerate(self.holds):
            comes, leaves = self.changes.get(rank, (EMPTY, EMPTY))
            if comes == expert or (expert in held and leaves != expert):
                return True
        return False

    def _bring_elsewhere(self, expert: int) -> bool:
        """Plan the arrival of an expert on one of the ranks that must get it."""
        return any(expert in coming and self._bring(rank, expert) for rank, coming in enumerate(self.coming))

    def _clear(self) -> None:
        """Plan the removal of one unwanted expert per rank, if another rank keeps the expert."""
        for rank, experts in enumerate(self.leaving):
            for expert in experts:
                self.changes[rank] = (EMPTY, expert)
                if self._is_kept(expert):
                    break
                del self.changes[rank]
