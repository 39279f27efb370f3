"""Dispatchers against a slow reference, over real process groups of 1, 2 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dispatch_ranks import HIDDEN, SLOTS, expert, run_rank, run_rank_in_rounds
from rank_pool import RankPool
from torch import Tensor

from moe_runtime.kernels.cpu.loader import load_or_none


def reference(x_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    out = torch.zeros(x_TD.shape)
    for t, slots in enumerate(slot_TK.tolist()):
        for k, slot in enumerate(slots):
            if slot >= 0:
                out[t] += expert(x_TD[t], slot).float() * weights_TK[t, k]
    return out.to(x_TD.dtype)


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


def skip_without_native_kernels(name: str) -> None:
    if name == "symmetric" and load_or_none() is None:
        pytest.skip("no native kernels")


KINDS = ["even", "skewed", "a rank without tokens", "all to one rank", "some dropped"]


WAYS = [
    (1, "local"),
    (1, "all_to_all"),
    *((num_ranks, name) for num_ranks in (2, 4) for name in ("all_to_all", "all_gather", "symmetric")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_ranks", "name"), WAYS)
def test_equals_reference(
    rank_pool: Callable[[int], RankPool], num_ranks: int, name: str, kind: str, dtype: torch.dtype
) -> None:
    skip_without_native_kernels(name)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_ranks", "name"), WAYS)
def test_rounds_sum_to_the_same_bits_and_bound_what_a_slot_gets(
    rank_pool: Callable[[int], RankPool], num_ranks: int, name: str, kind: str, dtype: torch.dtype
) -> None:
    skip_without_native_kernels(name)
    work = [routing(kind, num_ranks, rank) for rank in range(num_ranks)]
    work = [(x.to(dtype), slot, weight) for x, slot, weight in work]
    capacities = torch.randint(1, 4, (num_ranks,)).tolist()
    results = rank_pool(num_ranks).run(run_rank_in_rounds, name, work, capacities)
    for (x, slot, weight), (out, _) in zip(work, results, strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out, reference(x, slot, weight), rtol=0, atol=0)
    own = [torch.bincount(slot[slot >= 0], minlength=num_ranks * SLOTS).tolist() for _, slot, _ in work]
    needed = max(-(-count // most) for counts, most in zip(own, capacities, strict=True) for count in counts)
    assert {len(counts) for _, counts in results} == {max(1, needed)}
    for rank, (_, rounds) in enumerate(results):
        for number, counts in enumerate(rounds):
            for slot, count in enumerate(counts, rank * SLOTS):
                wanted = [min(max(own[w][slot] - number * most, 0), most) for w, most in enumerate(capacities)]
                assert count == sum(wanted)


@pytest.mark.parametrize("name", ["all_to_all", "all_gather", "symmetric"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_no_rank_has_a_token(rank_pool: Callable[[int], RankPool], num_ranks: int, name: str) -> None:
    skip_without_native_kernels(name)
    empty = (torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    results = rank_pool(num_ranks).run(run_rank, name, [empty] * num_ranks)
    assert all(out.shape == (0, HIDDEN) and sum(counts) == 0 for out, counts in results)
