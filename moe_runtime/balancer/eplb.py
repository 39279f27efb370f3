"""DeepSeek's published expert-parallel load balancer (EPLB), as the baseline that plans are compared with.

Its global policy: each spare slot goes to the expert with the most load per replica. The replicas, heaviest first,
go to the rank with the least load that has a free slot. It ignores the current placement and the ranks' speeds. The
published version needs the same number of slots on all ranks. This one allows any: a rank drops out when it is full.

Shape suffixes: L MoE layers, E logical experts, W ranks, S slots per rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.checks import check_load, in_mean_ranks
from moe_runtime.balancer.improve import Layer
from moe_runtime.balancer.pack import pack_heaviest_first
from moe_runtime.balancer.placement import Placement
from moe_runtime.balancer.plan import Plan, check_slots, keep_slots, moves_between


def plan_eplb(
    load: npt.ArrayLike, num_ranks: int, slots_per_rank: int | Sequence[int], current: Placement | None = None
) -> Plan:
    """Place experts as EPLB does (github.com/deepseek-ai/EPLB, `rebalance_experts` with one group and one node).

    Arguments, result and errors are those of `plan_placement`, without its limits on moves. Two replicas of an expert
    that EPLB puts on one rank work as one, so the second slot stays empty. `current` only decides which slots of a
    rank the experts take: experts that stay on a rank keep their slots.
    """
    load_LE = check_load("load", load, ("layers", "experts"))
    num_slots_W = check_slots(num_ranks, slots_per_rank, load_LE.shape[1])
    load_LE = in_mean_ranks(load_LE, num_ranks)
    slots_LWS = np.array([pack_heaviest_first(load_E, num_slots_W) for load_E in load_LE])
    layer_ids, version = tuple(range(len(load_LE))), 0
    if current is not None:
        slots_LWS = keep_slots(slots_LWS, current, num_slots_W)
        layer_ids, version = current.layer_ids, current.version + 1
    speed_W = np.ones(num_ranks)
    layers = [
        Layer(load_E, slots_WS, num_slots_W, speed_W) for load_E, slots_WS in zip(load_LE, slots_LWS, strict=True)
    ]
    balancedness_L = np.minimum([1 / layer.level for layer in layers], 1.0)
    placement = Placement(slots_LWS.astype(np.int32), load_LE.shape[1], layer_ids, version)
    return Plan(placement, moves_between(current, slots_LWS), balancedness_L)
