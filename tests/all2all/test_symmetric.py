"""The shared-memory dispatcher: random sizes, one and many dispatch rounds, missing ranks, missing memory.

`test_dispatch.py` compares it, with the other dispatchers, with the slow reference.
"""

from __future__ import annotations

import errno
import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from symmetric_ranks import (
    SLOTS,
    be_killed,
    make,
    run_alone,
    run_both,
    run_many,
    run_named,
    run_refused,
    run_shared_row,
)

from moe_runtime.all2all import symmetric
from moe_runtime.kernels.cpu.loader import load_or_none

pytestmark = pytest.mark.skipif(load_or_none() is None, reason="no native kernels")

Pools = Callable[[int], RankPool]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounds", [False, True], ids=["one round", "rounds"])
@pytest.mark.parametrize(("num_ranks", "steps"), [(1, 100), (2, 600), (4, 200)])
def test_random_sizes(
    rank_pool: Pools, seed: int, num_ranks: int, steps: int, rounds: bool, dtype: torch.dtype
) -> None:
    max_bytes = num_ranks * 4000 if rounds else symmetric.MAX_BYTES
    for capacity, wrong in rank_pool(num_ranks).run(run_many, seed, dtype, max_bytes, steps):
        assert capacity < 20 if rounds else capacity == 64
        assert not wrong


def test_rounds_equal_one_round(rank_pool: Pools, seed: int) -> None:
    for capacity, one, many, equal in rank_pool(2).run(run_both, seed, [17, 50]):
        assert capacity == 2, "a rank has one token in a round"
        assert torch.equal(one.counts_S, many.counts_S)
        assert sorted(one.x_ND[one.row_R].tolist()) == sorted(many.x_ND[many.row_R].tolist())
        assert equal


def test_a_token_travels_once_to_a_rank(rank_pool: Pools) -> None:
    first, second = rank_pool(2).run(run_shared_row)
    assert first == ([], [0] * SLOTS)
    assert second == ([0, 1, 2, 3, 4] * SLOTS, [5] * SLOTS)


@pytest.mark.parametrize("both_dispatch", [False, True], ids=["dispatch", "combine"])
@pytest.mark.parametrize("late_rank", [0, 2])
def test_a_rank_that_does_not_come_is_named(rank_pool: Pools, late_rank: int, both_dispatch: bool) -> None:
    answers = rank_pool(4).run(run_alone, late_rank, both_dispatch)
    message = f"symmetric: no rows from rank {late_rank} within 0.3 s"
    assert answers == [None if rank == late_rank else message for rank in range(4)]


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    ranks = [
        context.Process(target=be_killed, args=(rank, str(tmp_path / "store"), theirs), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    assert ours.poll(60), "rank 0 waits for ever"
    assert ours.recv() == (2, "symmetric: no rows from rank 1 within 1 s")
    for process, code in zip(ranks, (0, -signal.SIGKILL), strict=True):
        process.join(10)
        assert process.exitcode == code
        process.close()
    for pipe in (ours, theirs):
        pipe.close()


def test_segments_have_no_names_while_in_use(rank_pool: Pools, seed: int) -> None:
    assert rank_pool(2).run(run_named, f"test{seed}") == [(False, 2)] * 2


@pytest.mark.parametrize(
    ("name", "effect", "message"),
    [
        ("free_bytes", {"return_value": 30_000}, "has 0.0 MB free; use dispatcher all_gather or all_to_all"),
        ("os.posix_fallocate", {"side_effect": OSError(errno.ENOSPC, "full")}, "use dispatcher all_gather or"),
        ("os.posix_fallocate", {"side_effect": OSError(errno.EPERM, "no")}, "rank 1 cannot reserve shared memory: Op"),
        ("_map", {"return_value": None}, "rank 1 cannot open the shared memory of rank 0; all ranks must be on one"),
    ],
    ids=["too small", "full meanwhile", "forbidden", "another host"],
)
def test_memory_that_is_not_there_is_an_error_on_all_ranks(
    rank_pool: Pools, seed: int, name: str, effect: dict[str, Any], message: str
) -> None:
    target = name if name.startswith("os.") else f"moe_runtime.all2all.symmetric.{name}"
    answers = rank_pool(2).run(run_refused, f"test{seed}", 1, {target: effect})
    assert answers[0] == answers[1]
    assert answers[0].startswith("symmetric: ")
    assert message in answers[0]


def test_the_error_names_needed_and_free_memory(rank_pool: Pools, seed: int) -> None:
    patches = {"moe_runtime.all2all.symmetric.free_bytes": {"return_value": 12_345}}
    (answer, _) = rank_pool(2).run(run_refused, f"test{seed}", 0, patches)
    assert answer.startswith("symmetric: needs 0.1 MB of shared memory, /dev/shm has 0.0 MB free; ")


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype: torch\.float16 is not allowed with symmetric"):
        make(None, torch.float16)
