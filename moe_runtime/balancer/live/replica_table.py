"""Which slots a rank's tokens take: tables computed from the placement and the last counts, sent when they change.

Shape suffixes: L MoE layers, V ranks that send, W ranks that compute, E logical experts, H experts with replicas,
J replicas, S slots per rank, P entries of a table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.choice import quotas, replica_table, slots_by_rank
from moe_runtime.balancer.placement import EMPTY, Placement
from moe_runtime.balancer.split import split_tokens
from moe_runtime.wire.messages import REPLICA_TURNS, ReplicaChoice

SLACK = 0.05  # relative to the least possible load of the busiest rank: a smaller gain is not worth new tables
MAX_CELLS = 1 << 20  # quotas computed at a time, 8 bytes each
TABLES_A_STEP = 512  # tables computed between two steps; one layer may exceed it

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass
class _Told:
    """What the front has sent to the ranks about a layer's experts.

    Attributes:
        hosts_EW: 1 where a rank has an expert, 0 elsewhere.
        expert_H: experts with replicas, ascending.
        slot_HJ: their global slots, EMPTY after the last.
        table_VHP: each rank's tables.
        part_VHJ: the part of each rank's tokens that goes to each replica.
    """

    hosts_EW: Floats
    expert_H: Ints
    slot_HJ: Ints
    table_VHP: npt.NDArray[np.int32]
    part_VHJ: Floats

    def rank_load(self, count_VE: npt.NDArray[np.integer], max_slots: int) -> Floats:
        """float64 [W]: tokens that each rank computes if ranks send `count_VE`."""
        count_E = count_VE.sum(axis=0).astype(np.float64)
        count_E[self.expert_H] = 0
        sent_HJ = np.einsum("vh,vhj->hj", count_VE[:, self.expert_H], self.part_VHJ)
        held = self.slot_HJ != EMPTY
        num_ranks = self.hosts_EW.shape[1]
        shared_W = np.bincount(self.slot_HJ[held] // max_slots, weights=sent_HJ[held], minlength=num_ranks)
        load_W: Floats = count_E @ self.hosts_EW + shared_W
        return load_W


class ReplicaTables:
    """The replica tables that the ranks have, and the changes that the front must send next.

    Args:
        placement: the ranks' initial placement; ranks initially send each expert's tokens to its first slot.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._counts_VLE: npt.NDArray[np.integer] = np.zeros(
            (placement.num_ranks, placement.num_layers, placement.num_experts), np.int64
        )
        self._single_LE: Ints = placement.first_slot.astype(np.int64)  # EMPTY where ranks have tables
        self._told: dict[int, _Told] = {}  # by layer, only layers with replicas
        self._due: dict[int, bool] = {}  # layer -> whether it gets new tables whatever its load is
        self._news: list[list[ReplicaChoice]] = [[] for _ in range(placement.num_ranks)]
        self._tell(range(placement.num_layers))

    @property
    def has_replicas(self) -> bool:
        """Whether any expert has replicas, so that counts matter."""
        return bool(self._told)

    def place(self, placement: Placement) -> npt.NDArray[np.intp]:
        """Follow a new placement; the next plan carries the changes. Returns the layers that have changed."""
        changed: npt.NDArray[np.intp] = (placement.slots != self._placement.slots).any(axis=(1, 2)).nonzero()[0]
        self._placement = placement
        self._tell(changed.tolist())
        return changed

    def weigh(self, counts_VLE: npt.NDArray[np.integer]) -> None:
        """Take new counts. Layers whose busiest rank is more than SLACK above the mean become due, the worst first.

        Args:
            counts_VLE: recent tokens of each rank for each expert.
        """
        self._counts_VLE = counts_VLE
        excess = {layer: self._excess(layer) for layer in self._told}
        worst_first = sorted(excess, key=lambda layer: -excess[layer])
        wanted = {layer: False for layer in worst_first if excess[layer] > 1 + SLACK}
        self._due = wanted | {layer: True for layer, is_certain in self._due.items() if is_certain}

    def refresh(self) -> None:
        """Make all layers with replicas due, for the best balance and for the most tokens on their own rank."""
        self._due |= dict.fromkeys(self._told, True)

    def advance(self) -> None:
        """Between two steps, compute new tables for some of the layers that are due, so that it takes little time.

        A layer that is due only because of its load is skipped unless it is more than SLACK above the least possible.
        """
        chosen, num_tables = [], 0
        while self._due and num_tables < TABLES_A_STEP:
            layer = next(iter(self._due))
            is_certain = self._due.pop(layer)
            if layer in self._told:  # its replicas may have gone since
                num_tables += self._told[layer].table_VHP[..., 0].size
                if is_certain or self._is_worth_it(layer):
                    chosen.append(layer)
        self._tell(chosen)

    def take_news(self) -> list[list[ReplicaChoice]] | None:
        """The replica choices that each rank gets with the next plan; None if there are none."""
        if not any(self._news):
            return None
        news, self._news = self._news, [[] for _ in self._news]
        return news

    def _excess(self, layer: int) -> float:
        """Tokens of the busiest rank / mean over ranks."""
        load_W = self._told[layer].rank_load(self._counts_VLE[:, layer], self._placement.max_slots)
        return float(load_W.max() / (load_W.mean() or 1.0))

    def _is_worth_it(self, layer: int) -> bool:
        count_E = self._counts_VLE[:, layer].sum(axis=0).astype(np.float64)
        least_W = count_E @ split_tokens(count_E, self._placement.slots[layer])
        return self._excess(layer) * float(least_W.mean()) > (1 + SLACK) * float(least_W.max())

    def _tell(self, layers: Iterable[int]) -> None:
        """Compute the tables of layers; what differs from the ranks' tables becomes news."""
        replicated: list[tuple[int, Ints, Ints]] = []  # layer, slots, experts with replicas
        counts, shares, slots = [], [], []
        for layer in layers:
            slot_EW = slots_by_rank(self._placement.slots[layer], self._placement.num_experts)
            is_replicated_E = (slot_EW != EMPTY).sum(axis=1) > 1
            self._tell_single(layer, np.where(is_replicated_E, EMPTY, slot_EW.max(axis=1)))
            expert_H = is_replicated_E.nonzero()[0]
            if len(expert_H):
                count_VE = self._counts_VLE[:, layer]
                share_EW = split_tokens(
                    count_VE.sum(axis=0).astype(np.float64),
                    self._placement.slots[layer],
                )
                replicated.append((layer, slot_EW, expert_H))
                counts.append(count_VE[:, expert_H])
                shares.append(share_EW[expert_H])
                slots.append(slot_EW[expert_H])
            else:
                self._told.pop(layer, None)
        if replicated:
            table_VHP = _tables(
                np.concatenate(counts, axis=1),
                np.concatenate(shares),
                np.concatenate(slots),
            )
            ends = np.cumsum([len(expert_H) for _, _, expert_H in replicated])[:-1]
            for found, tables in zip(replicated, np.split(table_VHP, ends, axis=1), strict=True):
                self._tell_tables(*found, tables)

    def _tell_single(self, layer: int, slot_E: Ints) -> None:
        for expert in ((slot_E != self._single_LE[layer]) & (slot_E != EMPTY)).nonzero()[0].tolist():
            for news in self._news:
                news.append(ReplicaChoice(layer, expert, [int(slot_E[expert])]))
        self._single_LE[layer] = slot_E

    def _tell_tables(
        self,
        layer: int,
        slot_EW: Ints,
        expert_H: Ints,
        table_VHP: npt.NDArray[np.int32],
    ) -> None:
        is_new_VH = np.ones(table_VHP.shape[:2], bool)
        if (before := self._told.get(layer)) is not None:
            _, now, then = np.intersect1d(expert_H, before.expert_H, assume_unique=True, return_indices=True)
            is_new_VH[:, now] = (table_VHP[:, now] != before.table_VHP[:, then]).any(axis=2)
        for rank, row in np.argwhere(is_new_VH).tolist():
            slots = table_VHP[rank, row].tolist()
            self._news[rank].append(
                ReplicaChoice(
                    layer,
                    int(expert_H[row]),
                    slots if len(set(slots)) > 1 else slots[:1],
                )
            )
        slot_HJ = -np.sort(-slot_EW[expert_H], axis=1)  # EMPTY last
        slot_HJ = slot_HJ[:, : (slot_HJ != EMPTY).sum(axis=1).max()]
        part_VHJ = (table_VHP[:, :, None] == slot_HJ[:, :, None]).mean(axis=3)
        self._told[layer] = _Told((slot_EW != EMPTY) * 1.0, expert_H, slot_HJ, table_VHP, part_VHJ)


def _tables(count_VH: npt.NDArray[np.integer], share_HW: Floats, slot_HW: Ints) -> npt.NDArray[np.int32]:
    """int32 [V, H, P]: every rank's table of every row; rows are split, as each row has V x W quotas."""
    num_ranks, num_rows = count_VH.shape
    table_VHP = np.empty((num_ranks, num_rows, REPLICA_TURNS), np.int32)
    piece = max(1, MAX_CELLS // num_ranks**2)
    for start in range(0, num_rows, piece):
        rows = slice(start, start + piece)
        quota_VHW = quotas(count_VH[:, rows], share_HW[rows])
        for rank, quota_HW in enumerate(quota_VHW):
            table_VHP[rank, rows] = replica_table(quota_HW, share_HW[rows], slot_HW[rows], rank, REPLICA_TURNS)
    return table_VHP
