"""A rank that joins the real process group, for tests of the rendezvous: `python gloo_rank.py` replaces the worker."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from moe_runtime.cluster.rank import RankArguments, join_group, run_rank
from moe_runtime.wire.executor import RankInfo
from moe_runtime.wire.messages import RankResult, RankStep, Sample, SlotReport, SlotTask
from moe_runtime.wire.transport import Init

COMMAND = (sys.executable, "-P", str(Path(__file__).resolve()))


class GlooWorker:
    def __init__(self, seat: RankArguments, init: Init) -> None:
        import torch

        self.rank = seat.rank
        self.group = join_group(seat, init)
        self.info = RankInfo(
            self.rank,
            os.getpid(),
            "cpu",
            "float32",
            torch.get_num_threads(),
            (8,),
            0,
            "float32",
            0,
            0.0,
            {},
            False,
            ("all_gather",),
        )

    def step(self, step: RankStep) -> RankResult:
        """Sums `step * (rank + 1)` over the ranks; the rank that `dispatcher` names exits without a message."""
        import torch
        import torch.distributed as dist

        if step.dispatcher == str(self.rank):
            os._exit(7)
        total = torch.tensor([step.step * (self.rank + 1)])
        dist.all_reduce(total, group=self.group)
        return RankResult(step.step, self.rank, [Sample(0, int(total))])

    def run_task(self, task: SlotTask) -> SlotReport:
        return SlotReport(self.rank, task.task_id, True, 0, 0.0, task.slot + self.rank)

    def expert_counts(self) -> np.ndarray:
        return np.zeros((2, 1, 1), dtype=np.int64)


if __name__ == "__main__":
    run_rank(GlooWorker)
