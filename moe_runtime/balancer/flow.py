"""The best way to share tokens among replicas: a small maximum flow, with the cut that proves it optimal.

Each expert's tokens may go to any rank that holds it. The goal is the least M such that every rank r gets at most
M * speed_r. By the duality of flows and cuts, M is the maximum over sets R of ranks of

    (load of the experts that only ranks in R hold) / (sum of the speeds in R),

so a set that reaches the M of a flow proves that both are optimal. Only experts with replicas are variables; there are
few of them.

Shape suffixes: W ranks, H experts that have replicas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

TOLERANCE = 1e-9  # relative error of the level; "exact" results are exact to this
FULL = 1e-12  # a rank this close to its limit has no room
GROUND = 1e-10


@dataclass(frozen=True)
class Flow:
    """Loads shared among replicas.

    Attributes:
        level: the least possible maximum over ranks of load / speed.
        sent_HW: how much of each replicated expert's load goes to each rank.
        busiest_W: a set of ranks that no sharing can bring below `level`.
    """

    level: float
    sent_HW: Floats
    busiest_W: Bools


def balance(fixed_W: Floats, speed_W: Floats, weight_H: Floats, hosts_HW: Floats, known: Flow | None = None) -> Flow:
    """Share the loads `weight_H` among their hosts, in addition to the fixed loads, with the least maximum.

    Newton's method on the level (Dinkelbach 1967; Radzik 1998): starting from a lower bound, augmenting paths relieve
    the ranks above it. If they cannot, the ranks reached are a cut, whose level is the next bound. The start is near
    the solution (currents in a network whose conductances are the loads), so few paths remain to be found.

    Args:
        fixed_W: load of the experts that only one rank holds.
        speed_W: above 0.
        weight_H: load of each expert that has replicas.
        hosts_HW: 1 on the ranks that hold it, 0 on others.
        known: a sharing to start from, with a lower bound of the level and the set that proves this bound.
    """
    sent_HW = _currents(fixed_W, speed_W, weight_H, hosts_HW) if known is None else known.sent_HW
    load_W = fixed_W + np.ones(len(weight_H)) @ sent_HW  # a product with ones is the fastest sum
    order_W = (load_W / -speed_W).argsort(kind="stable")
    if known is None:
        level_W = _levels_of_busiest(order_W, fixed_W, speed_W, weight_H, hosts_HW)
        best = int(level_W.argmax())
        level, busiest_W = float(level_W[best]), np.ones(len(fixed_W), bool)
        busiest_W[order_W[best + 1 :]] = False
    else:
        level, busiest_W = known.level, known.busiest_W
    num_above = int((load_W > speed_W * (level * (1 + TOLERANCE))).sum())
    above = order_W[:num_above].tolist()
    if above:
        network = _Network(speed_W, sent_HW, load_W, hosts_HW)
        level, cut = network.relieve(above, level)
        sent_HW = network.sent_array()
        if cut:
            busiest_W = np.zeros(len(fixed_W), bool)
            busiest_W[cut] = True
    return Flow(level, sent_HW, busiest_W)


def _levels_of_busiest(
    order_W: npt.NDArray[np.intp], fixed_W: Floats, speed_W: Floats, weight_H: Floats, hosts_HW: Floats
) -> Floats:
    """Lower bounds of the level: the cuts that consist of the first 1, 2, ... W ranks of an order."""
    place_W = np.empty_like(order_W)
    place_W[order_W] = np.arange(len(order_W))
    held_within_W = fixed_W[order_W]
    if len(weight_H):
        last_H = (hosts_HW * place_W).max(axis=1).astype(np.intp)
        held_within_W += np.bincount(last_H, weights=weight_H, minlength=len(order_W))
    levels_W: Floats = held_within_W.cumsum() / speed_W[order_W].cumsum()
    return levels_W


def _currents(fixed_W: Floats, speed_W: Floats, weight_H: Floats, hosts_HW: Floats) -> Floats:
    """Even shares, changed like currents that flow from ranks above the mean to ranks below it; no share is negative.

    One linear system gives the currents; its matrix is the network's Laplacian.
    """
    num_ranks, num_experts = len(fixed_W), len(weight_H)
    ones_H, ones_W = np.ones(num_experts), np.ones(num_ranks)
    possible_HW = hosts_HW * weight_H[:, None]
    even_HW = possible_HW / (hosts_HW @ ones_W)[:, None]
    load_W = fixed_W + ones_H @ even_HW
    through_W = ones_H @ possible_HW
    mean_through = through_W.sum() / num_ranks
    if mean_through == 0:
        return even_HW
    laplacian_WW = hosts_HW.T @ -even_HW
    # potentials are only known up to a constant; the ground is for parts of the network that are not connected
    laplacian_WW += mean_through / num_ranks
    laplacian_WW.flat[:: num_ranks + 1] += through_W + GROUND * mean_through
    potential_W = np.linalg.solve(laplacian_WW, load_W - speed_W * ((load_W @ ones_W) / (speed_W @ ones_W)))
    sent_HW = even_HW + hosts_HW * (even_HW @ potential_W)[:, None]
    sent_HW -= possible_HW * potential_W
    np.maximum(sent_HW, 0, out=sent_HW)
    total_H = sent_HW @ ones_W
    if not total_H.all():  # an expert has no load, or rounding lost it
        none_H = total_H == 0
        sent_HW[none_H] = even_HW[none_H]
        total_H[none_H] = np.where(weight_H[none_H] > 0, weight_H[none_H], 1)
    sent_HW *= (weight_H / total_H)[:, None]
    return sent_HW


class _Network:
    """The flow as plain lists, which are faster than arrays for paths of few steps."""

    def __init__(self, speed_W: Floats, sent_HW: Floats, load_W: Floats, hosts_HW: Floats) -> None:
        self.shape = hosts_HW.shape
        self.pairs = hosts_HW.nonzero()
        self.speed: list[float] = speed_W.tolist()
        self.load: list[float] = load_W.tolist()
        self.sent: list[dict[int, float]] = [{} for _ in hosts_HW]
        self.experts_of: list[list[int]] = [[] for _ in self.speed]
        for e, r, amount in zip(*(pair.tolist() for pair in self.pairs), sent_HW[self.pairs].tolist(), strict=True):
            self.sent[e][r] = amount
            self.experts_of[r].append(e)

    def sent_array(self) -> Floats:
        sent_HW = np.zeros(self.shape)
        sent_HW[self.pairs] = [amount for sent_e in self.sent for amount in sent_e.values()]
        return sent_HW

    def relieve(self, above: list[int], level: float) -> tuple[float, list[int]]:
        """Bring ranks down to the level, raising it if necessary; returns it, and the last cut that raised it."""
        speed, load = self.speed, self.load
        cut: list[int] = []
        for source in above:
            while load[source] > level * (1 + TOLERANCE) * speed[source]:
                reached, has_sent = self._spread(source, level)
                if not has_sent:
                    cut = reached
                    cut_level = sum([load[r] for r in cut]) / sum([speed[r] for r in cut])
                    level = max(cut_level, level * (1 + TOLERANCE / 8))
        return level, cut

    def _spread(self, source: int, level: float) -> tuple[list[int], bool]:
        """Send load from `source` to every rank with room that it reaches, nearest first, until it is at the level.

        A rank is reached if load of an expert can move to it from a reached rank. Returns the ranks reached (all
        reachable ranks if nothing could be sent), and whether any load was sent.
        """
        speed, load, sent, experts_of = self.speed, self.load, self.sent, self.experts_of
        step_to = {source: (-1, -1)}  # rank -> (previous rank, expert)
        reached, has_sent = [source], False
        room = level * (1 - FULL)
        for here in reached:  # the loop appends to it: breadth-first search
            least = FULL * level * speed[here]
            for e in experts_of[here]:
                sent_e = sent[e]
                if sent_e[here] > least:
                    for there in sent_e:
                        if there not in step_to:
                            step_to[there] = (here, e)
                            reached.append(there)
                            if load[there] < room * speed[there]:
                                has_sent |= self._send(source, there, step_to, level)
                                if load[source] <= level * (1 + TOLERANCE) * speed[source]:
                                    return reached, has_sent
        return reached, has_sent

    def _send(self, source: int, target: int, step_to: dict[int, tuple[int, int]], level: float) -> bool:
        """Send the source's excess load, limited by the target's room and by each step of the path.

        False if a step can carry no more load.
        """
        speed, load, sent = self.speed, self.load, self.sent
        amount = min(load[source] - level * speed[source], level * speed[target] - load[target])
        there = target
        while there != source:
            here, e = step_to[there]
            if sent[e][here] < amount:
                amount = sent[e][here]
            there = here
        if amount == 0:
            return False
        there = target
        while there != source:
            here, e = step_to[there]
            sent[e][here] -= amount
            sent[e][there] += amount
            there = here
        load[source] -= amount
        load[target] += amount
        return True
