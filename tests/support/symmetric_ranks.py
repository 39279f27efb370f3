"""Functions for ranks in the tests of the shared-memory dispatcher; in a module that the pool can import."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankContext
from torch import Tensor

from moe_runtime.all2all import symmetric
from moe_runtime.all2all.dispatch import Dispatched
from moe_runtime.all2all.symmetric import SymmetricDispatcher
from moe_runtime.kernels import torch_ops

SLOTS, HIDDEN, TOP_K = 3, 24, 3


def make(group, dtype: torch.dtype = torch.float32, max_tokens: int = 64, timeout: float = 30, **options: int):
    return SymmetricDispatcher(
        group, SLOTS, max_tokens=max_tokens, hidden_size=HIDDEN, top_k=TOP_K, dtype=dtype, timeout=timeout, **options
    )


def experts(x_RD: Tensor, slot_R: Tensor) -> Tensor:
    """Stand-in experts whose rows identify the slot and depend on every input; same bits alone and in a batch."""
    return x_RD * (slot_R[:, None] + 1).to(x_RD.dtype) + x_RD.flip(-1)


def compute(sent: Dispatched, rank: int) -> Tensor:
    slot_R = torch.arange(SLOTS).repeat_interleave(sent.counts_S) + rank * SLOTS
    return experts(sent.x_ND[sent.row_R], slot_R)


def expected(x_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    y_TKD = torch.stack([experts(x_TD, cache_position_T) for cache_position_T in slot_TK.T], 1)
    return torch_ops.combine_topk(y_TKD * (slot_TK >= 0)[..., None], weights_TK)


def draw(tokens: int, num_ranks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's tokens, with slots on all ranks or on only one; in both cases some are dropped."""
    near = random.random() < 0.3
    first = random.randrange(num_ranks) * SLOTS if near else 0
    choices = SLOTS if near else num_ranks * SLOTS
    slot_TK = first + torch.rand(tokens, choices).argsort(1)[:, :TOP_K]
    slot_TK = torch.where(torch.rand(slot_TK.shape) < random.choice([0, 0.3, 1]), -1, slot_TK)
    return torch.randn(tokens, HIDDEN).to(dtype), slot_TK, torch.rand(tokens, TOP_K)


def run_many(context: RankContext, seed: int, dtype: torch.dtype, max_bytes: int, steps: int) -> tuple[int, list[int]]:
    """Steps of random sizes, some with a limit for each slot; returns the capacity and the steps with wrong results."""
    way = make(context.group, dtype, max_bytes=max_bytes)
    same, wrong = random.Random(seed), []
    random.seed(seed + context.rank)
    torch.manual_seed(seed + context.rank)
    with torch.inference_mode():
        for step in range(steps):
            largest = same.choice([1, 2, 40])
            tokens_per_rank = [same.choice([0, 1, same.randint(0, largest)]) for _ in range(context.num_ranks)]
            x_TD, slot_TK, weights_TK = draw(tokens_per_rank[context.rank], context.num_ranks, dtype)
            if random.random() < 0.01:
                time.sleep(0.001)  # the others fall asleep
            if same.random() < 0.3:
                limits = [same.randint(1, 6) for _ in range(context.num_ranks)]
                rounds = [
                    way.bring_back(compute(sent, context.rank), sent)
                    for sent in way.dispatch_rounds(x_TD, slot_TK, tokens_per_rank, limits)
                ]
                out_TD = way.combine_rounds(rounds, weights_TK)
            else:
                sent = way.dispatch(x_TD, slot_TK, tokens_per_rank)
                out_TD = way.combine(compute(sent, context.rank), sent, weights_TK)
            if not torch.equal(out_TD, expected(x_TD, slot_TK, weights_TK)):
                wrong.append(step)
    return way.capacity, wrong


def run_both(context: RankContext, seed: int, tokens_per_rank: list[int]) -> tuple[int, Dispatched, Dispatched, bool]:
    random.seed(seed + context.rank)
    torch.manual_seed(seed + context.rank)
    x_TD, slot_TK, weights_TK = draw(tokens_per_rank[context.rank], context.num_ranks, torch.bfloat16)
    results = []
    ways = [make(context.group, torch.bfloat16, max_bytes=size) for size in (symmetric.MAX_BYTES, 1)]
    for way in ways:
        sent = way.dispatch(x_TD, slot_TK, tokens_per_rank)
        results.append((sent, way.combine(compute(sent, context.rank), sent, weights_TK)))
    (one, out_one), (many, out_many) = results
    return ways[1].capacity, one, many, torch.equal(out_one, out_many)


def run_shared_row(context: RankContext) -> tuple[list[int], list[int]]:
    """All tokens of rank 0 go to all slots of rank 1, which has no tokens."""
    way = make(context.group)
    tokens = 5 if context.rank == 0 else 0
    slot_TK = torch.arange(SLOTS, 2 * SLOTS).expand(tokens, -1)
    sent = way.dispatch(torch.randn(tokens, HIDDEN), slot_TK, [5, 0])
    return sent.row_R.tolist(), sent.counts_S.tolist()


def run_alone(context: RankContext, late_rank: int, both_dispatch: bool) -> str | None:
    """The ranks' errors when one of them stops before `dispatch` or before `combine`."""
    way = make(context.group, timeout=0.3)
    x_TD, slot_TK, weights_TK = draw(4, context.num_ranks, torch.float32)
    tokens_per_rank = [4] * context.num_ranks
    if both_dispatch:
        sent = way.dispatch(x_TD, slot_TK, tokens_per_rank)
    if context.rank == late_rank:
        return None
    with pytest.raises(TimeoutError) as error:
        if both_dispatch:
            way.combine(compute(sent, context.rank), sent, weights_TK)
        else:
            way.dispatch(x_TD, slot_TK, tokens_per_rank)
    return str(error.value)


def be_killed(rank: int, store_path: str, answers: Connection) -> None:
    """Rank 1 is killed after a step; rank 0 reports the error that it gets."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", store=dist.FileStore(store_path, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    way = make(dist.group.WORLD, timeout=1)
    for step in range(3):
        x_TD, slot_TK, weights_TK = draw(4, 2, torch.float32)
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            sent = way.dispatch(x_TD, slot_TK, [4, 4])
        except TimeoutError as error:
            answers.send((step, str(error)))
            os._exit(0)
        way.combine(compute(sent, rank), sent, weights_TK)


def run_named(context: RankContext, token: str) -> tuple[bool, int]:
    """Whether this rank's segment has a name while it is in use, and how many segments without one are mapped."""
    with mock.patch("secrets.token_hex", lambda size: f"{token}-{context.rank}"):
        way = make(context.group)
    dist.barrier(context.group)
    named = (symmetric.SHARED_MEMORY / f"moe-runtime-{token}-{context.rank}").exists()
    maps = Path("/proc/self/maps").read_text().splitlines()
    del way
    after = Path("/proc/self/maps").read_text()
    assert token not in after, "the segments stay mapped"
    return named, sum(token in line and line.endswith("(deleted)") for line in maps)


def run_refused(context: RankContext, token: str, refusing_rank: int, patches: dict[str, dict[str, Any]]) -> str:
    """The error with functions of the module replaced on one rank."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("secrets.token_hex", lambda size: f"{token}-{context.rank}"))
        if context.rank == refusing_rank:
            for name, effect in patches.items():
                stack.enter_context(mock.patch(name, **effect))
        with pytest.raises(ValueError) as error:
            make(context.group)
    assert not list(symmetric.SHARED_MEMORY.glob(f"moe-runtime-{token}-{context.rank}"))
    return str(error.value)
