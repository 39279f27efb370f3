"""Improves a layer's placement by few moves.

The level of a layer (the busiest rank's load / speed under the best shares) is the maximum over sets of ranks of the
load that cannot leave the set (`flow.py`). So a step must let load leave the busiest set: by a replica outside the set,
in the slot of a replica that is not needed, or by an exchange of two experts. Each set found so far gives a lower bound
of the level after a step. The step with the least bound is tried: either it is proved the best, or a new set is found.

Shape suffixes: E logical experts, W ranks, S slots per rank, K sets of ranks, A experts that must leave the busiest
set, P places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.flow import TOLERANCE, Bools, Floats, Flow, balance
from moe_runtime.balancer.placement import EMPTY

Ints = npt.NDArray[np.int64]
Change = tuple[int, int, int]  # rank, slot, the expert that it gets

NUM_HOT = 4  # experts of the busiest set that are tried
NUM_PLACES = 16  # slots outside the busiest set that are tried for a replica
NUM_EXCHANGE_RANKS = 4  # ranks outside the busiest set that are tried for an exchange
NUM_TRIALS = 2  # exact evaluations for a step
NEARLY_EVEN = 1.03  # above this level it is worth searching twice for a step
MAX_CUTS = 32  # sets remembered, besides the single ranks
MAX_BOUNDS = 24  # sets used as bounds of the steps: those with the highest levels
MAX_IDLE_STEPS = 3  # steps without a gain, because several sets are at the same level
CROWDED = 1e-3  # weight of the term that breaks ties between equal bounds
GOOD = 0.01  # a replica that gains this much is taken without trying exchanges


@dataclass(frozen=True)
class Step:
    """Slots that get another expert, and the resulting flow."""

    changes: tuple[Change, ...]
    flow: Flow


@dataclass(frozen=True)
class Improvement:
    """Changes that belong together, and how much they lower the level, in units of the mean rank's load."""

    changes: tuple[Change, ...]
    gain: float

    @property
    def gain_per_move(self) -> float:
        return self.gain / len(self.changes)


@dataclass(frozen=True)
class Candidates:
    """Steps to try: each expert of A to each place of P that `allowed_AP` lets it take.

    In an exchange, the expert of the place moves to `from_A`, where the incoming expert was. If `from_A` is -1, there
    is no exchange: the incoming expert also stays where it is, and the expert of the place loses a replica.
    """

    expert_A: Ints
    from_A: Ints
    yields_P: Ints
    to_P: Ints
    slot_P: Ints
    allowed_AP: npt.NDArray[np.bool_]


class Layer:
    """The slots of a layer under a load, and the best flow for them.

    Args:
        load_E: tokens per expert, in units of the mean rank's load.
        slots_WS: changed by `apply`.
        num_slots_W: slots that each rank has.
        speed_W: relative speeds with a mean of 1.
    """

    def __init__(self, load_E: Floats, slots_WS: Ints, num_slots_W: Ints, speed_W: Floats) -> None:
        num_ranks, max_slots = slots_WS.shape
        self.slots_WS = slots_WS
        self.speed_W = speed_W
        self.usable_WS = np.arange(max_slots) < num_slots_W[:, None]
        # the last row is for expert -1, an empty slot, which has no load
        self.load_E = np.append(load_E, 0.0)
        self.hosts_EW = np.zeros((len(self.load_E), num_ranks))
        rank, slot = (slots_WS != EMPTY).nonzero()
        self.hosts_EW[slots_WS[rank, slot], rank] = 1
        self.cuts_KW = np.zeros((0, num_ranks))
        self.sent_EW = np.zeros_like(self.hosts_EW)
        self.flow = self._flow(self.hosts_EW, None)
        self._accept(self.hosts_EW, self.flow)

    @property
    def level(self) -> float:
        return self.flow.level

    def apply(self, step: Step) -> None:
        self._accept(self._hosts_after(step.changes), step.flow)
        for rank, slot, expert in step.changes:
            self.slots_WS[rank, slot] = expert

    def best_step(self) -> Step | None:
        """The step that lowers the level most per move, or at least lets load leave the busiest set; or None."""
        self._remember(self.flow)
        outside_E = self.hosts_EW @ (1.0 - self.flow.busiest_W)
        inside = ((outside_E == 0) & (self.load_E > 0)).nonzero()[0]
        hot_A = inside[np.argsort(-self.load_E[inside], kind="stable")][:NUM_HOT]
        replication = self._best(self._replications(hot_A))
        if replication is not None and replication.flow.level <= self.level - GOOD:
            return replication
        steps = [step for step in (replication, self._best(self._exchanges(hot_A))) if step is not None]
        return max(steps, key=lambda step: (self.level - step.flow.level) / len(step.changes), default=None)

    def _flow(self, hosts_EW: Floats, start: tuple[Floats, float, Bools] | None) -> Flow:
        replicated_H = (hosts_EW @ np.ones(hosts_EW.shape[1]) > 1).nonzero()[0]
        fixed_E = self.load_E.copy()
        fixed_E[replicated_H] = 0
        known = None if start is None else Flow(start[1], start[0][replicated_H], start[2])
        return balance(fixed_E @ hosts_EW, self.speed_W, self.load_E[replicated_H], hosts_EW[replicated_H], known)

    def _accept(self, hosts_EW: Floats, flow: Flow) -> None:
        self.hosts_EW, self.flow = hosts_EW, flow
        self.count_E = hosts_EW.sum(axis=1)
        self.sent_EW = hosts_EW * self.load_E[:, None]
        self.sent_EW[self.count_E > 1] = flow.sent_HW
        self.level_W = self.sent_EW.sum(axis=0) / self.speed_W

    def _hosts_after(self, changes: tuple[Change, ...]) -> Floats:
        hosts_EW = self.hosts_EW.copy()
        for rank, slot, expert in changes:
            hosts_EW[self.slots_WS[rank, slot], rank] = 0
            hosts_EW[expert, rank] = 1
        return hosts_EW

    def _flow_after(self, changes: tuple[Change, ...], bound: tuple[float, Bools]) -> Flow:
        """The best flow after a step, starting from the current flow and a proved bound of the level with its set."""
        hosts_EW = self._hosts_after(changes)
        sent_EW = self.sent_EW.copy()
        for rank, slot, _ in changes:
            yields = self.slots_WS[rank, slot]
            if yields != EMPTY:
                stay_W = hosts_EW[yields]
                sent_EW[yields] = stay_W * (sent_EW[yields] + sent_EW[yields, rank] / stay_W.sum())
        return self._flow(hosts_EW, (sent_EW, *bound))

    def _remember(self, flow: Flow) -> None:
        if flow.busiest_W.sum() > 1 and not (self.cuts_KW == flow.busiest_W).all(axis=1).any():
            self.cuts_KW = np.concatenate([self.cuts_KW[-MAX_CUTS + 1 :], flow.busiest_W[None]])

    def _highest_cuts(self) -> Floats:
        """[K, W]: among single ranks and remembered sets, those with the highest levels; MAX_BOUNDS at most."""
        num_ranks = len(self.speed_W)
        single_W = (self.load_E * (self.count_E == 1)) @ self.hosts_EW / self.speed_W
        held_K = ((1 - self.cuts_KW) @ self.hosts_EW.T == 0) @ self.load_E
        level = np.concatenate([single_W, held_K / (self.cuts_KW @ self.speed_W)])
        highest = np.argsort(-level, kind="stable")[:MAX_BOUNDS]
        cuts_KW = np.zeros((len(highest), num_ranks))
        is_single = highest < num_ranks
        cuts_KW[is_single.nonzero()[0], highest[is_single]] = 1
        cuts_KW[~is_single] = self.cuts_KW[highest[~is_single] - num_ranks]
        return cuts_KW

    def _replications(self, hot_A: Ints) -> Candidates:
        """Replicas outside the busiest set, in empty slots and in slots of experts that have other replicas."""
        yields_W = self.count_E[self.slots_WS] > 1
        yields_W |= self.usable_WS & (self.slots_WS == EMPTY)
        to, slot = (yields_W & ~self.flow.busiest_W[:, None]).nonzero()
        # a place is good if its rank has little load left after its expert has gone
        left = self.level_W[to] - self.sent_EW[self.slots_WS[to, slot], to] / self.speed_W[to]
        best_P = np.argsort(left, kind="stable")[:NUM_PLACES]
        to_P, slot_P = to[best_P], slot[best_P]
        allowed_AP = self.hosts_EW[hot_A][:, to_P] == 0
        return Candidates(hot_A, np.full(len(hot_A), -1), self.slots_WS[to_P, slot_P], to_P, slot_P, allowed_AP)

    def _exchanges(self, hot_A: Ints) -> Candidates:
        """Exchanges of experts of the busiest set for experts with less load on the lightest ranks outside it."""
        lightest = np.where(self.flow.busiest_W, np.inf, self.level_W).argsort(kind="stable")[:NUM_EXCHANGE_RANKS]
        lightest = lightest[~self.flow.busiest_W[lightest]]
        row, slot_P = (self.slots_WS[lightest] != EMPTY).nonzero()
        to_P = lightest[row]
        yields_P = self.slots_WS[to_P, slot_P]
        row, from_A = self.hosts_EW[hot_A].nonzero()
        expert_A = hot_A[row]
        allowed_AP = self.hosts_EW[expert_A][:, to_P] == 0
        allowed_AP &= self.hosts_EW[yields_P][:, from_A].T == 0
        allowed_AP &= self.load_E[yields_P] < self.load_E[expert_A][:, None]
        return Candidates(expert_A, from_A, yields_P, to_P, slot_P, allowed_AP)

    def _best(self, candidates: Candidates) -> Step | None:
        """The candidate with the lowest level, among a few that are tried in order of their bounds."""
        if not candidates.allowed_AP.any():
            return None
        cuts_KW = self._highest_cuts()
        bound_KAP = self._bounds(cuts_KW, candidates)
        # among equal bounds, prefer the least load above the mean in all sets together
        crowded_AP = CROWDED * (np.maximum(bound_KAP - 1, 0) ** 2).mean(axis=0)
        crowded_AP[~candidates.allowed_AP] = np.inf
        best: Step | None = None
        for trial in range(NUM_TRIALS):
            bound_AP = bound_KAP.max(axis=0)
            row, place = divmod(int((bound_AP + crowded_AP).argmin()), bound_AP.shape[1])
            limit = self.level if best is None else best.flow.level * (1 - TOLERANCE)
            if bound_AP[row, place] > limit or crowded_AP[row, place] == np.inf:
                break
            changes = self._changes(candidates, row, place)
            cut = int(bound_KAP[:, row, place].argmax())
            flow = self._flow_after(changes, (float(bound_AP[row, place]), cuts_KW[cut] > 0))
            if best is None or flow.level < best.flow.level:
                best = Step(changes, flow)
            self._remember(flow)
            if trial < NUM_TRIALS - 1:
                crowded_AP[row, place] = np.inf
                cut_KW = flow.busiest_W[None].astype(np.float64)
                cuts_KW = np.concatenate([cuts_KW, cut_KW])
                bound_KAP = np.concatenate([bound_KAP, self._bounds(cut_KW, candidates)])
        return best if best is not None and best.flow.level <= self.level * (1 + TOLERANCE) else None

    def _bounds(self, cuts_KW: Floats, candidates: Candidates) -> Floats:
        """[K, A, P]: the levels of sets after each candidate."""
        outside_KE = (1 - cuts_KW) @ self.hosts_EW.T  # number of an expert's ranks outside the set
        within_KE = (outside_KE == 0) * self.load_E
        held_K, speed_K = within_KE @ np.ones(len(self.load_E)), cuts_KW @ self.speed_W
        outside_KW = 1 - cuts_KW
        to_KP = outside_KW[:, candidates.to_P]
        from_KA = np.where(candidates.from_A < 0, 0, outside_KW[:, candidates.from_A])
        more_KAP = to_KP[:, None, :] - from_KA[:, :, None]  # ranks outside: one expert gains, the other loses
        held_KAP: Floats = (outside_KE[:, candidates.expert_A, None] + more_KAP == 0) * self.load_E[
            candidates.expert_A
        ][:, None]
        held_KAP += (outside_KE[:, None, candidates.yields_P] - more_KAP == 0) * self.load_E[candidates.yields_P]
        held_KAP += (held_K[:, None] - within_KE[:, candidates.expert_A])[:, :, None]
        held_KAP -= within_KE[:, None, candidates.yields_P]
        held_KAP /= speed_K[:, None, None]
        return held_KAP

    def _changes(self, candidates: Candidates, row: int, place: int) -> tuple[Change, ...]:
        expert, from_ = int(candidates.expert_A[row]), int(candidates.from_A[row])
        change = (int(candidates.to_P[place]), int(candidates.slot_P[place]), expert)
        if from_ < 0:
            return (change,)
        slot = int((self.slots_WS[from_] == expert).argmax())
        return (change, (from_, slot, int(candidates.yields_P[place])))


def improvements(layer: Layer, least_gain: float) -> Iterator[Improvement]:
    """Improvements of a layer's level, one after the other, each gaining at least `least_gain` per move.

    `layer` has the changes of all improvements yielded; after the last, it may have more.
    """
    while layer.level > 1 + least_gain:
        start = layer.level
        changes: tuple[Change, ...] = ()
        for _ in range(MAX_IDLE_STEPS):
            step = layer.best_step()
            if step is None and layer.level > NEARLY_EVEN:
                step = layer.best_step()  # the sets found in the failed search lead to other candidates
            if step is None:
                return
            layer.apply(step)
            changes += step.changes
            if start - layer.level >= least_gain * len(changes):
                break
        else:
            return
        yield Improvement(changes, start - layer.level)
