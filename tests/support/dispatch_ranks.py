"""Functions for ranks in the tests of the dispatchers; in a module that the pool's processes can import."""

from __future__ import annotations

import torch
from rank_pool import RankContext
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatched, Dispatcher, LocalDispatcher, make_dispatchers
from moe_runtime.all2all.symmetric import SymmetricDispatcher

SLOTS, HIDDEN = 3, 8


def expert(x_D: Tensor, slot: int) -> Tensor:
    """A stand-in for an expert whose output identifies the slot and depends on every input."""
    return (x_D.float() * (slot + 1) + x_D.float().flip(0).sin()).to(x_D.dtype)


def make(context: RankContext, name: str, dtype: torch.dtype) -> Dispatcher:
    if name == "local":
        return LocalDispatcher(SLOTS)
    if name == "symmetric":
        sizes = {"max_tokens": 8, "hidden_size": HIDDEN, "top_k": 2}
        return SymmetricDispatcher(context.group, SLOTS, dtype=dtype, timeout=30, **sizes)
    return make_dispatchers(context.group, SLOTS)[name]


def compute(context: RankContext, sent: Dispatched) -> Tensor:
    slots = torch.arange(SLOTS).repeat_interleave(sent.counts_S).tolist()
    rows = [expert(sent.x_ND[row], context.rank * SLOTS + s) for row, s in zip(sent.row_R, slots, strict=True)]
    return torch.stack(rows) if rows else sent.x_ND.new_empty(0, HIDDEN)


def run_rank(context: RankContext, name: str, work: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, list[int]]:
    x_TD, slot_TK, weights_TK = work[context.rank]
    way = make(context, name, x_TD.dtype)
    sent = way.dispatch(x_TD, slot_TK, [len(x) for x, _, _ in work])
    return way.combine(compute(context, sent), sent, weights_TK), sent.counts_S.tolist()


def run_rank_in_rounds(
    context: RankContext, name: str, work: list[tuple[Tensor, Tensor, Tensor]], capacities: list[int]
) -> tuple[Tensor, list[list[int]]]:
    """The combined rows, and what each slot of this rank computed in each dispatch round."""
    x_TD, slot_TK, weights_TK = work[context.rank]
    way = make(context, name, x_TD.dtype)
    rounds, counts = [], []
    for sent in way.dispatch_rounds(x_TD, slot_TK, [len(x) for x, _, _ in work], capacities):
        rounds.append(way.bring_back(compute(context, sent), sent))
        counts.append(sent.counts_S.tolist())
    return way.combine_rounds(rounds, weights_TK), counts
