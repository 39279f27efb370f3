"""A sparse block of several ranks as one native call, against gate, dispatch, experts, combine and norm one by one.

`test_same_tokens.py` and `models/test_same_bits.py` compare whole engines of one rank and of several ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from native_layer_ranks import run_alone, run_steps
from rank_pool import RankPool

from moe_runtime.all2all import symmetric
from moe_runtime.kernels.cpu.loader import load_or_none

pytestmark = pytest.mark.skipif(load_or_none() is None, reason="no native kernels")

Pools = Callable[[int], RankPool]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_bytes", [20_000, symmetric.MAX_BYTES], ids=["rounds", "one round"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_call_gives_the_same_bits(
    rank_pool: Pools, seed: int, num_ranks: int, max_bytes: int, dtype: torch.dtype
) -> None:
    assert rank_pool(num_ranks).run(run_steps, seed, dtype, max_bytes, 40) == [[]] * num_ranks


@pytest.mark.parametrize("late_rank", [0, 2])
def test_a_rank_that_does_not_come_is_named(rank_pool: Pools, late_rank: int) -> None:
    message = f"symmetric: no rows from rank {late_rank} within 0.3 s"
    assert rank_pool(4).run(run_alone, late_rank) == [None if rank == late_rank else message for rank in range(4)]
