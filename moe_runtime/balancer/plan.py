"""Which expert should sit in which slot: placements planned from loads.

Shape suffixes: L MoE layers, E logical experts, W ranks, S slots per rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.checks import check_load, check_speed, in_mean_ranks, relative
from moe_runtime.balancer.flow import Floats
from moe_runtime.balancer.improve import Improvement, Ints, Layer, improvements
from moe_runtime.balancer.pack import fill_slots, pack_heaviest_first, pack_layer
from moe_runtime.balancer.placement import EMPTY, Placement
from moe_runtime.balancer.resize import resize_layer

LEAST_GAIN = 0.005  # relative to the mean rank load, per move: less is not worth copying an expert
LEAST_GAIN_AT_FIRST = 1e-4  # the same without a current placement, as all slots must be filled anyway
MAX_IMPROVEMENTS_AT_FIRST = 8  # per layer


@dataclass(frozen=True)
class Move:
    """A copy of an expert's weights into a slot; `layer` counts MoE layers from 0."""

    layer: int
    rank: int
    slot: int
    expert: int


@dataclass(frozen=True)
class Plan:
    """A placement and the moves that lead to it.

    Attributes:
        placement: where the experts must be. Experts that stay on a rank stay in their slots.
        moves: one per slot with an expert that its rank did not hold before, in order of layer, rank and slot.
        balancedness: float64 [L], mean rank load / max rank load (each divided by the rank's speed) under the load
            that was planned for; `split_tokens` shares the tokens.
    """

    placement: Placement
    moves: tuple[Move, ...]
    balancedness: Floats


def plan_placement(
    load: npt.ArrayLike,
    num_ranks: int,
    slots_per_rank: int | Sequence[int],
    current: Placement | None = None,
    rank_speed: npt.ArrayLike | None = None,
    max_moves: int | None = None,
) -> Plan:
    """Place experts so that the busiest rank of each layer has the least possible load; spare slots hold replicas.

    Without `current`, all slots are filled (`pack.py`). With it, the moves that lower the busiest rank's load most are
    chosen one by one over all layers (`improve.py`), as long as each gains half a percent of a rank's load. A move
    puts a replica of a hot expert into the slot of a replica that is no longer needed, or two experts change places.
    The result depends only on the arguments.

    Args:
        load: [L, E], tokens per layer and logical expert, in any unit; a layer of zeros counts as an even load.
        num_ranks: W.
        slots_per_rank: slots of every rank, or one number per rank; together at least E.
        current: where the experts are now. Its ranks may have other numbers of slots than planned for. New slots
            are filled if that is worth it. An expert in a removed slot moves if it has no other replica.
        rank_speed: [W], relative speed of each rank; None: all equal.
        max_moves: the largest number of moves, over all layers; needs `current`.

    Raises:
        ValueError: loads or speeds that are negative or not finite, too few slots, a `current` of another model or
            number of ranks, or `max_moves` below the number of moves that removed slots make necessary.
    """
    load_LE = check_load("load", load, ("layers", "experts"))
    num_layers, num_experts = load_LE.shape
    num_slots_W = check_slots(num_ranks, slots_per_rank, num_experts)
    speed_W = check_speed(rank_speed, num_ranks)
    _check_current(current, max_moves, (num_layers, num_ranks, num_experts))
    weight_L = relative(load_LE).sum(axis=1)
    load_LE = in_mean_ranks(load_LE, num_ranks)
    if current is None:
        layers = [_pack_best(load_E, num_slots_W, speed_W) for load_E in load_LE]
    else:
        slots = (resize_layer(*layer, num_slots_W) for layer in zip(current.slots, load_LE, strict=True))
        layers = [Layer(*layer, num_slots_W, speed_W) for layer in zip(load_LE, slots, strict=True)]
    planned_LWS = np.array([layer.slots_WS for layer in layers])
    if current is None:
        level_L = _improve_all(layers, planned_LWS)
        layer_ids, version = tuple(range(num_layers)), 0
    else:
        forced = len(moves_between(current, planned_LWS))
        budget = planned_LWS.size if max_moves is None else max_moves - forced
        if budget < 0:
            raise ValueError(
                f"max_moves: {max_moves} is not allowed; "
                f"it must be at least {forced}, the number of moves that the removed slots make necessary"
            )
        level_L = _improve_best(layers, planned_LWS, weight_L, budget)
        planned_LWS = keep_slots(planned_LWS, current, num_slots_W)
        changed = planned_LWS.shape != current.slots.shape or bool((planned_LWS != current.slots).any())
        layer_ids, version = current.layer_ids, current.version + changed
    placement = Placement(planned_LWS.astype(np.int32), num_experts, layer_ids, version)
    return Plan(placement, moves_between(current, planned_LWS), np.minimum(1 / level_L, 1.0))


def moves_between(before: Placement | None, slots_LWS: npt.NDArray[np.integer]) -> tuple[Move, ...]:
    """One move per slot with an expert that its rank did not hold before; if `before` is None, per filled slot."""
    layer, rank, slot = (slots_LWS != EMPTY).nonzero()
    expert = slots_LWS[layer, rank, slot]
    if before is not None:
        new = ~before.hosts[layer, rank, expert]
        layer, rank, slot, expert = layer[new], rank[new], slot[new], expert[new]
    columns = (layer.tolist(), rank.tolist(), slot.tolist(), expert.tolist())
    return tuple(Move(*move) for move in zip(*columns, strict=True))


def keep_slots(slots_LWS: Ints, current: Placement, num_slots_W: Ints) -> Ints:
    """The same experts on the same ranks. An expert that has a slot there keeps it; others take the free slots."""
    kept_LWS = slots_LWS.copy()
    for layer, rank in np.ndindex(slots_LWS.shape[:2]):
        now = current.slots[layer, rank, : num_slots_W[rank]].tolist()
        wanted = slots_LWS[layer, rank].tolist()
        if wanted[: len(now)] == now:
            continue
        row = [expert if expert in wanted else EMPTY for expert in now] + [EMPTY] * (len(wanted) - len(now))
        others = iter([expert for expert in wanted if expert != EMPTY and expert not in row])
        kept_LWS[layer, rank] = [expert if expert != EMPTY else next(others, EMPTY) for expert in row]
    return kept_LWS


def check_slots(num_ranks: int, slots_per_rank: int | Sequence[int], num_experts: int) -> Ints:
    """int64 [W]: the slots of each rank.

    Raises:
        ValueError: no rank, not one number per rank, or fewer slots than experts.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks: {num_ranks} is not allowed; it must be at least 1")
    given = np.asarray(slots_per_rank)
    if given.dtype.kind not in "iu" or given.shape not in ((), (num_ranks,)) or (given < 1).any():
        raise ValueError(
            f"slots_per_rank: {given.tolist()} is not allowed; it must be an integer of at least 1, "
            f"or {num_ranks} of them, one per rank"
        )
    num_slots_W = np.broadcast_to(given, num_ranks).astype(np.int64)
    if num_slots_W.sum() < num_experts:
        raise ValueError(
            f"slots_per_rank: {given.tolist()} is not allowed; {num_ranks} ranks must have at least {num_experts} "
            f"slots together, one per expert"
        )
    return num_slots_W


def _check_current(current: Placement | None, max_moves: int | None, shape: tuple[int, int, int]) -> None:
    if max_moves is not None and (current is None or max_moves < 0):
        needs = (
            "without `current` every slot is a move; it must be None" if current is None else "it must be at least 0"
        )
        raise ValueError(f"max_moves: {max_moves} is not allowed; {needs}")
    if current is not None:
        found = (current.num_layers, current.num_ranks, current.num_experts)
        if found != shape:
            raise ValueError(
                f"current: a placement of {found[0]} layers, {found[1]} ranks and {found[2]} experts is not allowed; "
                f"it must be of {shape[0]}, {shape[1]} and {shape[2]}"
            )


def _pack_best(load_E: Floats, num_slots_W: Ints, speed_W: Floats) -> Layer:
    """The better of `pack_layer` (ring) and `pack_heaviest_first`: with few slots the ring may be uneven."""
    ring = Layer(load_E, pack_layer(load_E, num_slots_W, speed_W), num_slots_W, speed_W)
    if ring.level <= 1 + LEAST_GAIN_AT_FIRST:
        return ring
    slots_WS = fill_slots(pack_heaviest_first(load_E, num_slots_W), num_slots_W, load_E)
    return min(ring, Layer(load_E, slots_WS, num_slots_W, speed_W), key=lambda layer: layer.level)


def _apply(slots_WS: npt.NDArray[np.integer], improvement: Improvement) -> None:
    for rank, slot, expert in improvement.changes:
        slots_WS[rank, slot] = expert


def _improve_all(layers: list[Layer], planned_LWS: Ints) -> Floats:
    """Improve every layer separately, as far as possible; float64 [L], the levels reached."""
    level_L = np.array([layer.level for layer in layers])
    for number, layer in enumerate(layers):
        steps = improvements(layer, LEAST_GAIN_AT_FIRST)
        for improvement, _ in zip(steps, range(MAX_IMPROVEMENTS_AT_FIRST), strict=False):
            _apply(planned_LWS[number], improvement)
            level_L[number] -= improvement.gain
    return level_L


def _improve_best(layers: list[Layer], planned_LWS: Ints, weight_L: Floats, budget: int) -> Floats:
    """Make the moves that gain most, over all layers; float64 [L], the levels reached."""
    level_L = np.array([layer.level for layer in layers])
    queue: list[tuple[float, int, Improvement, Iterator[Improvement]]] = []

    def push(number: int, steps: Iterator[Improvement]) -> None:
        improvement = next(steps, None)
        if improvement is not None:
            heapq.heappush(queue, (-improvement.gain_per_move * weight_L[number], number, improvement, steps))

    if budget:
        for number, layer in enumerate(layers):
            push(number, improvements(layer, LEAST_GAIN))
    while queue:
        _, number, improvement, steps = heapq.heappop(queue)
        if len(improvement.changes) <= budget:
            budget -= len(improvement.changes)
            _apply(planned_LWS[number], improvement)
            level_L[number] -= improvement.gain
            if budget:
                push(number, steps)
    return level_L
