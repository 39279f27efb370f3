"""Padded dispatchers give the same bits as the exact ones, and neither direction waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dispatch_ranks import HIDDEN, SLOTS, run_rank
from no_sync import NoSync
from padded_ranks import run_padded
from rank_pool import RankPool
from torch import Tensor

ROWS, TOP_K = 7, 2


def padded_work(num_ranks: int, dtype: torch.dtype, num_live: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows, slots and weights of each rank; rows behind the live ones have no slot, and some live ones drop one."""
    work = []
    for live in num_live:
        slot_TK = torch.rand(ROWS, num_ranks * SLOTS).argsort(dim=1)[:, :TOP_K]
        slot_TK = torch.where(torch.rand(slot_TK.shape) < 0.2, -1, slot_TK)
        slot_TK[live:] = -1
        work.append((torch.randn(ROWS, HIDDEN).to(dtype), slot_TK, torch.rand(ROWS, TOP_K)))
    return work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_equals_the_exact_dispatcher(rank_pool: Callable[[int], RankPool], num_ranks: int, dtype: torch.dtype) -> None:
    exact_way = "local" if num_ranks == 1 else "all_to_all"
    for num_live in ([int(n) for n in torch.randint(1, ROWS + 1, (num_ranks,))], [0] * (num_ranks - 1) + [ROWS]):
        work = padded_work(num_ranks, dtype, num_live)
        padded = rank_pool(num_ranks).run(run_padded, work)
        exact = rank_pool(num_ranks).run(run_rank, exact_way, work)
        for live, (ours, our_counts), (theirs, their_counts) in zip(num_live, padded, exact, strict=True):
            assert our_counts == their_counts
            assert torch.equal(ours, theirs) and torch.isfinite(ours).all() and not ours[live:].any()


def test_the_proof_would_fail_where_something_waits() -> None:
    x = torch.randn(4)
    for wait in (lambda: x[0].item(), lambda: x.tolist(), lambda: x[x > 0], lambda: x.nonzero(), lambda: bool(x[0])):
        with pytest.raises(AssertionError, match="waits for the device"), NoSync():
            wait()
