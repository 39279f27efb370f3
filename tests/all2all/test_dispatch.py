"""Dispatchers against a slow reference, over real process groups of 1, 2 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rank_pool import RankContext, RankPool
from torch import Tensor

from moe_runtime.all2all.dispatch import LocalDispatcher, make_dispatchers

SLOTS, HIDDEN = 3, 8


def expert(x_D: Tensor, slot: int) -> Tensor:
    """A stand-in for an expert whose output tells the slot and depends on every input."""
    return (x_D.float() * (slot + 1) + x_D.float().flip(0).sin()).to(x_D.dtype)


def reference(x_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    out = torch.zeros(x_TD.shape)
    for t, slots in enumerate(slot_TK.tolist()):
        for k, slot in enumerate(slots):
            if slot >= 0:
                out[t] += expert(x_TD[t], slot).float() * weights_TK[t, k]
    return out.to(x_TD.dtype)


def run_rank(context: RankContext, name: str, work: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, list[int]]:
    x_TD, slot_TK, weights_TK = work[context.rank]
    if context.num_ranks == 1 and name == "local":
        way = LocalDispatcher(SLOTS)
    else:
        way = make_dispatchers(context.group, SLOTS)[name]
    sent = way.dispatch(x_TD, slot_TK, [len(x) for x, _, _ in work])
    slots = torch.arange(SLOTS).repeat_interleave(sent.counts_S).tolist()
    rows = [expert(sent.x_ND[row], context.rank * SLOTS + s) for row, s in zip(sent.row_R, slots, strict=True)]
    y_RD = torch.stack(rows) if rows else x_TD.new_empty(0, HIDDEN)
    return way.combine(y_RD, sent, weights_TK), sent.counts_S.tolist()


def routing(kind: str, num_ranks: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of one rank, the slots of each and their weights, by a pattern that tends to break things."""
    total = num_ranks * SLOTS
    tokens = int(torch.randint(1, 9, ()))
    if kind == "a rank without tokens" and rank == num_ranks - 1:
        tokens = 0
    x_TD = torch.randn(tokens, HIDDEN)
    if kind == "all to one rank":
        slot_TK = torch.stack([torch.randperm(SLOTS)[:2] for _ in range(tokens)]) if tokens else torch.empty(0, 2)
    elif kind == "skewed":
        share = torch.arange(1, total + 1).float() ** -2
        slot_TK = torch.multinomial(share.expand(tokens, -1), 2)
    else:
        slot_TK = torch.rand(tokens, total).argsort(dim=1)[:, :2]
    if kind == "some dropped":
        slot_TK = torch.where(torch.rand(slot_TK.shape) < 0.3, -1, slot_TK)
    return x_TD, slot_TK.long(), torch.rand(tokens, 2)


KINDS = ["even", "skewed", "a rank without tokens", "all to one rank", "some dropped"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_ranks", "name"),
    [(1, "local"), (1, "all_to_all"), (2, "all_to_all"), (2, "all_gather"), (4, "all_to_all"), (4, "all_gather")],
)
def test_equals_reference(
    rank_pool: Callable[[int], RankPool], num_ranks: int, name: str, kind: str, dtype: torch.dtype
) -> None:
    work = [routing(kind, num_ranks, rank) for rank in range(num_ranks)]
    if kind == "a rank without tokens" and num_ranks == 1:
        work = [routing("even", 1, 0)]
    work = [(x.to(dtype), slot, weight) for x, slot, weight in work]
    results = rank_pool(num_ranks).run(run_rank, name, work)
    for (x, slot, weight), (out, _) in zip(work, results, strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out, reference(x, slot, weight), rtol=0, atol=0)
    computed = torch.tensor([counts for _, counts in results]).flatten()
    wanted = torch.cat([slot.flatten() for _, slot, _ in work])
    assert torch.equal(computed, torch.bincount(wanted[wanted >= 0], minlength=num_ranks * SLOTS))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_no_rank_has_a_token(rank_pool: Callable[[int], RankPool], num_ranks: int) -> None:
    empty = (torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    for name in ("all_to_all", "all_gather"):
        results = rank_pool(num_ranks).run(run_rank, name, [empty] * num_ranks)
        assert all(out.shape == (0, HIDDEN) and sum(counts) == 0 for out, counts in results)
