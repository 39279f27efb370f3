"""How an expert's tokens are shared among its replicas, and the resulting load of each rank.

Shape suffixes: L MoE layers, E logical experts, W ranks, S slots per rank, H experts that have replicas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.checks import check_integers, check_load, check_speed, relative
from moe_runtime.balancer.flow import Floats, balance
from moe_runtime.balancer.placement import EMPTY


def split_tokens(
    load_layer: npt.ArrayLike, slots_layer: npt.ArrayLike, rank_speed: npt.ArrayLike | None = None
) -> Floats:
    """The share of each expert's tokens that each rank's replica takes, with the least load on the busiest rank.

    The maximum over ranks of load / speed is the least possible (to a relative 1e-9); see `flow.py` for the method. The
    result depends only on the arguments.

    Args:
        load_layer: [E], tokens per logical expert, in any unit.
        slots_layer: integers [W, S], the logical expert in each slot, -1 where it is empty.
        rank_speed: [W], relative speed of each rank; None: all equal.

    Returns:
        float64 [E, W]. A row adds up to 1 and is 0 on ranks without the expert. Without tokens the shares are even.

    Raises:
        ValueError: loads or speeds that are not finite or negative, an expert without a slot, wrong shapes.
    """
    slots_WS = check_integers("slots_layer", slots_layer, ("ranks", "slots"))
    load_E = check_load("load_layer", load_layer, ("experts",))
    num_experts, num_ranks = len(load_E), len(slots_WS)
    speed_W = check_speed(rank_speed, num_ranks)
    expert_N, rank_N, num_slots_E = _pairs(slots_WS, num_experts)
    load_E = relative(load_E)

    replicated_H = (num_slots_E > 1).nonzero()[0]
    weight_H = load_E[replicated_H]
    load_E[replicated_H] = 0
    fixed_W = np.bincount(rank_N, weights=load_E[expert_N], minlength=num_ranks).astype(np.float64)
    share_EW = np.zeros((num_experts, num_ranks))
    share_EW[expert_N, rank_N] = 1
    hosts_HW = share_EW[replicated_H]
    sent_HW = balance(fixed_W, speed_W, weight_H, hosts_HW).sent_HW
    sent_HW[weight_H == 0] = hosts_HW[weight_H == 0]
    share_EW[replicated_H] = sent_HW / sent_HW.sum(axis=1)[:, None]
    return share_EW


def rank_loads(
    load_LE: npt.NDArray[Any], slots_LWS: npt.NDArray[np.integer], rank_speed: npt.ArrayLike | None = None
) -> Floats:
    """float64 [L, W]: the load of each rank in each layer, if tokens are shared by `split_tokens`.

    Arguments and errors are those of `split_tokens`, for several layers.
    """
    load_LW = np.empty(slots_LWS.shape[:2])
    for load_W, load_E, slots_WS in zip(load_LW, load_LE, slots_LWS, strict=True):
        load_W[:] = load_E @ split_tokens(load_E, slots_WS, rank_speed)
    return load_LW


def _pairs(
    slots_WS: npt.NDArray[Any], num_experts: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The expert and the rank of every slot that is not empty, and the number of each expert's slots.

    Raises:
        ValueError: a number that is not an expert, or an expert without a slot.
    """
    rank_N, slot_N = (slots_WS != EMPTY).nonzero()
    expert_N = slots_WS[rank_N, slot_N].astype(np.intp)
    low, high = (expert_N.min(), expert_N.max()) if len(expert_N) else (0, 0)
    if low < 0 or high >= num_experts:
        raise ValueError(
            f"slots_layer: expert {low if low < 0 else high} is not allowed; "
            f"it must be from 0 to {num_experts - 1}, or -1 for an empty slot"
        )
    num_slots_E = np.bincount(expert_N, minlength=num_experts)
    if not num_slots_E.all():
        raise ValueError(f"slots_layer: expert {num_slots_E.argmin()} has no slot; every expert must have one")
    return expert_N, rank_N, num_slots_E
