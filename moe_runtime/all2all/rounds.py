"""Dispatch rounds: the round of each row. Every rank computes the same number of rounds.

Shape suffixes: T tokens, K experts per token, N entries, W ranks, G slots of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def counts_of(value_N: Tensor, num_values: int) -> Tensor:
    """How often each of `0 .. num_values - 1` occurs; values may be -1. int64, without a device sync."""
    counts = torch.zeros(num_values + 1, dtype=torch.int64, device=value_N.device)
    counts.scatter_add_(0, value_N % (num_values + 1), torch.ones_like(value_N, dtype=torch.int64))
    return counts[:num_values]


def place_among_equals(value_N: Tensor, num_values: int) -> Tensor:
    """How many equal values come before each, `[N]`; values are `-1 .. num_values - 1`. Without a device sync."""
    value_N = value_N % (num_values + 1)
    order_N = value_N.argsort(stable=True)
    counts = counts_of(value_N, num_values + 1)
    first = counts.cumsum(0) - counts
    place_N = torch.empty_like(value_N)
    place_N[order_N] = torch.arange(len(value_N), device=value_N.device) - first[value_N[order_N]]
    return place_N


def round_of(slot_TK: Tensor, num_slots: int, capacity: int) -> Tensor:
    """The round of each (token, k), `[T, K]`: in each round a slot gets at most `capacity` rows of a rank, in order."""
    return (place_among_equals(slot_TK.flatten(), num_slots) // capacity).view_as(slot_TK)


def in_round(slot: Tensor, round_number: Tensor, wanted: int) -> Tensor:
    """The slots of one round; -1 elsewhere."""
    return torch.where(round_number == wanted, slot, -1)


def num_rounds(counts_WG: Tensor, capacity_W: Tensor) -> int:
    """Dispatch rounds that the rows of all ranks need, at least one. Waits for the device.

    Args:
        counts_WG: rows that each rank has for each slot.
        capacity_W: rows of each rank that a slot takes in a round.
    """
    return max(1, int((-(-counts_WG // capacity_W[:, None])).max()))
