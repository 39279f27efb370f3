"""A layer's placement from scratch: how many replicas each expert gets, and which slots they take.

Shape suffixes: E logical experts, W ranks, S slots per rank.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.flow import Floats
from moe_runtime.balancer.placement import EMPTY

Ints = npt.NDArray[np.int64]


def pack_layer(load_E: Floats, num_slots_W: Ints, speed_W: Floats) -> Ints:
    """Fill all slots of a layer: the hottest experts get replicas, and the replicas connect the ranks in one ring.

    Each replicated expert covers as many consecutive ranks as it has replicas, and the next expert starts where it
    ends. If the load drifts later, the shares of replicas can then move load from any rank to any other. Pairs of ranks
    with the same two experts could only help each other. Hot and less hot experts alternate on the ring. The other
    experts go, largest first, to the lightest rank with a free slot (LPT, Graham 1969).

    Args:
        load_E: tokens per expert, not all 0.
        num_slots_W: slots of each rank; in total at least one per expert.
        speed_W: relative speeds.

    Returns:
        int64 [W, S], S the largest number of slots; no rank holds an expert twice, and every expert has a slot.
    """
    num_ranks = len(num_slots_W)
    count_E = num_replicas(load_E, int(num_slots_W.sum()), num_ranks)
    part_E = load_E / count_E
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    free = num_slots_W.tolist()
    speed = speed_W.tolist()

    def put(expert: int, rank: int) -> None:
        held[rank].append(expert)
        load[rank] += float(part_E[expert]) / speed[rank]
        free[rank] -= 1

    start = 0
    for expert in _alternate(_by_load(part_E, (count_E > 1).nonzero()[0])):
        ring = [rank % num_ranks for rank in range(start, start + num_ranks) if free[rank % num_ranks]]
        ring = ring[: count_E[expert]]
        for rank in ring:
            put(expert, rank)
        start = ring[-1]
    lightest = [(load[rank], rank) for rank in range(num_ranks) if free[rank]]
    heapq.heapify(lightest)
    for expert in _by_load(part_E, (count_E == 1).nonzero()[0]):
        rank = lightest[0][1]
        put(expert, rank)
        _put_back(lightest, load[rank], free[rank])
    slots_WS = np.full((num_ranks, int(num_slots_W.max())), EMPTY, np.int64)
    for rank, experts in enumerate(held):
        slots_WS[rank, : len(experts)] = experts
    return fill_slots(slots_WS, num_slots_W, load_E)


def pack_heaviest_first(load_E: Floats, num_slots_W: Ints) -> Ints:
    """Each spare slot goes to the expert with most load per replica; replicas, heaviest first, to the lightest rank.

    Two replicas of an expert on one rank work as one, so the second slot is left empty (`eplb.py`).

    Returns:
        int64 [W, S], S the largest number of slots.
    """
    count_E = np.ones(len(load_E), np.int64)
    for _ in range(int(num_slots_W.sum()) - len(load_E)):
        count_E[(load_E / count_E).argmax()] += 1
    part_E = load_E / count_E
    replicas = np.repeat(np.arange(len(load_E)), count_E)
    slots_WS = np.full((len(num_slots_W), int(num_slots_W.max())), EMPTY, np.int64)
    free = num_slots_W.tolist()
    lightest = [(0.0, rank) for rank in range(len(free))]  # a heap
    for expert in replicas[np.argsort(-part_E[replicas], kind="stable")].tolist():
        load, rank = lightest[0]
        free[rank] -= 1
        _put_back(lightest, load + float(part_E[expert]), free[rank])
        if expert not in slots_WS[rank]:
            slots_WS[rank, free[rank]] = expert
    return slots_WS


def _put_back(lightest: list[tuple[float, int]], load: float, free: int) -> None:
    """Update the load of the heap's first rank; without a free slot the rank leaves the heap."""
    if free:
        heapq.heapreplace(lightest, (load, lightest[0][1]))
    else:
        heapq.heappop(lightest)


def num_replicas(load_E: Floats, num_slots: int, num_ranks: int) -> Ints:
    """int64 [E]: one slot each. Each spare slot goes to the expert with most load per replica, at most one per rank."""
    count_E = np.ones(len(load_E), np.int64)
    part_E = load_E.astype(np.float64)
    for _ in range(min(num_slots, len(load_E) * num_ranks) - len(load_E)):
        expert = int(part_E.argmax())
        count_E[expert] += 1
        part_E[expert] = load_E[expert] / count_E[expert] if count_E[expert] < num_ranks else -1.0
    return count_E


def _by_load(load_E: Floats, experts: Ints) -> list[int]:
    """Experts with the most load first; equal loads by expert number."""
    order: list[int] = experts[np.argsort(-load_E[experts], kind="stable")].tolist()
    return order


def _alternate(order: list[int]) -> list[int]:
    """First, last, second, last but one, ... so that each pair of neighbours has about the same load."""
    half = (len(order) + 1) // 2
    return [expert for pair in zip(order[:half], [*reversed(order[half:]), -1], strict=False) for expert in pair][
        : len(order)
    ]


def fill_slots(slots_WS: Ints, num_slots_W: Ints, load_E: Floats) -> Ints:
    """Fill free slots with replicas: each gets the expert with most load per replica that its rank does not hold."""
    filled_WS = slots_WS.copy()
    usable_WS = np.arange(slots_WS.shape[1]) < num_slots_W[:, None]
    count_E = np.bincount(slots_WS[slots_WS != EMPTY], minlength=len(load_E))
    for rank, slot in np.argwhere(usable_WS & (slots_WS == EMPTY)).tolist():
        part_E = load_E / count_E
        part_E[filled_WS[rank][filled_WS[rank] != EMPTY]] = -1
        expert = int(part_E.argmax())
        if part_E[expert] >= 0:
            filled_WS[rank, slot] = expert
            count_E[expert] += 1
    return filled_WS
