"""A layer's slots when ranks get more or fewer slots.

Shape suffixes: E logical experts, W ranks, S slots per rank.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.flow import Floats
from moe_runtime.balancer.placement import EMPTY

Ints = npt.NDArray[np.int64]


def resize_layer(slots_WS: npt.NDArray[np.integer], load_E: Floats, num_slots_W: Ints) -> Ints:
    """The same experts in `num_slots_W` slots; every expert keeps at least one slot.

    Experts stay in their slots, or on their rank, if possible. Otherwise an expert without another replica goes to the
    least loaded rank that has an empty slot or a slot with a spare replica. There must be at least as many slots as
    experts.

    Returns:
        int64 [W, S], S the largest number of slots.
    """
    num_ranks, max_slots = len(num_slots_W), int(num_slots_W.max())
    resized_WS = np.full((num_ranks, max(max_slots, slots_WS.shape[1])), EMPTY, np.int64)
    resized_WS[:, : slots_WS.shape[1]] = slots_WS
    lost_WS = (np.arange(resized_WS.shape[1]) >= num_slots_W[:, None]) & (resized_WS != EMPTY)
    lost = [(int(rank), int(resized_WS[rank, slot])) for rank, slot in np.argwhere(lost_WS)]
    resized_WS[lost_WS] = EMPTY
    resized_WS = resized_WS[:, :max_slots]
    for rank, expert in sorted(lost, key=lambda pair: (-load_E[pair[1]], pair)):
        if not (resized_WS == expert).any():
            slot = _spare_position(resized_WS, num_slots_W, load_E, rank)
            if slot is not None:
                resized_WS[rank, slot] = expert
    for expert in sorted({expert for _, expert in lost}, key=lambda expert: (-load_E[expert], expert)):
        if not (resized_WS == expert).any():
            count_E = np.bincount(resized_WS[resized_WS != EMPTY], minlength=len(load_E))
            part_E = np.append(load_E / np.maximum(count_E, 1), 0.0)
            lightest_first = part_E[resized_WS].sum(axis=1).argsort(kind="stable").tolist()
            places = ((rank, _spare_position(resized_WS, num_slots_W, load_E, rank)) for rank in lightest_first)
            resized_WS[next(place for place in places if place[1] is not None)] = expert
    return resized_WS


def _spare_position(slots_WS: Ints, num_slots_W: Ints, load_E: Floats, rank: int) -> int | None:
    """An empty slot of a rank, or the slot of its least loaded expert that has another replica; or None."""
    held = slots_WS[rank, : num_slots_W[rank]]
    if (held == EMPTY).any():
        return int((held == EMPTY).argmax())
    count = (slots_WS[None] == held[:, None, None]).sum(axis=(1, 2))
    spare = (count > 1).nonzero()[0]
    return int(spare[load_E[held[spare]].argmin()]) if len(spare) else None
