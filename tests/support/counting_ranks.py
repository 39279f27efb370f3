"""Ranks without a model that count random tokens per step, for tests of how the front uses counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moe_runtime.wire.executor import CountsReport, RankInfo
from moe_runtime.wire.messages import Chunk, RankPlan, RankResult, SlotReport, SlotTask, StepPlan


def plan_of(step: int, prefill: int = 5, decode: int = 2, num_ranks: int = 2) -> StepPlan:
    """A step with `prefill` prompt tokens and `decode` decode rows, on the last rank."""
    chunks = [Chunk(seq_id, 7, 1, [], True) for seq_id in range(decode)]
    chunks += [Chunk(decode, 0, prefill, [], True)] if prefill else []
    works = [RankPlan() for _ in range(num_ranks - 1)] + [RankPlan(chunks=chunks, num_decode=decode)]
    return StepPlan(step, "all_to_all", [work.num_tokens for work in works], ranks=works)


class CountingRanks:
    """An `Executor` whose ranks answer when `reports` is called, with the counts at the time of the request."""

    max_inflight = 2

    def __init__(self, num_ranks: int = 2, num_layers: int = 3, num_experts: int = 8) -> None:
        self.shape = (num_layers, num_experts)
        self.random = np.random.default_rng()
        self.counts = np.zeros((num_ranks, 2, *self.shape), np.int64)
        self.asked: list[np.ndarray] = []
        self.tasks: list[tuple[int, SlotTask]] = []
        self.ranks = [
            RankInfo(rank, 0, "cpu", "float32", 1, (64,), 0, "float32", 0, 0.0, {}, False, ("all_to_all",))
            for rank in range(num_ranks)
        ]

    def run(self, note_plan: Callable[[StepPlan], object], num_steps: int) -> None:
        """Plan and run steps."""
        for step in range(num_steps):
            note_plan(plan_of(step, num_ranks=len(self.ranks)))
            self.counts += self.random.integers(0, 20, self.counts.shape)

    def submit(self, plan: StepPlan) -> None:
        raise AssertionError("steps come from `run`")

    def collect(self) -> list[RankResult]:
        raise AssertionError("steps are done as soon as they are planned")

    def expert_counts(self) -> np.ndarray:
        return self.counts.copy()

    def request_counts(self) -> None:
        self.asked.append(self.counts.copy())

    def send_task(self, rank: int, task: SlotTask) -> None:
        self.tasks.append((rank, task))

    def reports(self) -> list[CountsReport | SlotReport]:
        reports: list[CountsReport | SlotReport] = [
            CountsReport(rank, counts_2LE) for counts_W2LE in self.asked for rank, counts_2LE in enumerate(counts_W2LE)
        ]
        self.asked = []
        return reports

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
