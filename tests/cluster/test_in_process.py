"""The executor of a single rank, in the caller's process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_rank import model_config, step_plan

from moe_runtime.cluster import in_process
from moe_runtime.config.engine import EngineConfig
from moe_runtime.wire.executor import RankInfo
from moe_runtime.wire.messages import RankResult, RankStep

NOWHERE = Path("/nowhere")


def test_a_step_is_run_and_errors_pass_through(monkeypatch):
    made = []

    class Worker:
        info = RankInfo(0, os.getpid(), "cpu", "float32", 1, (8,), 0, "float32", 0, 0.0, {}, False, ("all_gather",))

        def __init__(self, *args) -> None:
            made.append(args)

        def prepare(self, step: RankStep) -> RankStep:
            asked.append(f"prepare {step.step}")
            return step

        def begin(self, step: RankStep) -> None:
            if step.dispatcher:
                raise RuntimeError(step.dispatcher)
            asked.append(f"begin {step.step}")
            self.step = step.step

        def finish(self) -> RankResult:
            asked.append(f"finish {self.step}")
            return RankResult(self.step, 0)

        def forget(self) -> None:
            asked.append("forget")

        def expert_counts(self) -> np.ndarray:
            asked.append("counts")
            return np.ones((2, 3, 4), dtype=np.int64)

    asked: list[str] = []
    monkeypatch.setattr(in_process, "Worker", Worker)
    config = EngineConfig(model="fake")
    executor = in_process.InProcessExecutor(config, model_config(), NOWHERE)
    assert made == [(config, model_config(), NOWHERE)]
    assert (executor.ranks, executor.max_inflight) == ([Worker.info], 2)
    executor.submit(step_plan(4, 1))
    executor.request_counts()
    executor.submit(step_plan(5, 1))
    assert asked == ["prepare 4", "begin 4", "prepare 5"] and not executor.reports()
    assert executor.collect() == [RankResult(4, 0)]
    assert asked[3:] == ["finish 4", "counts", "begin 5"]  # counts are those behind step 4
    assert [report.rank for report in executor.reports()] == [0]
    assert executor.collect() == [RankResult(5, 0)]
    with pytest.raises(RuntimeError, match=r"^no such expert$"):
        executor.submit(step_plan(6, 1, commands="no such expert"))
    assert executor.expert_counts().sum() == 24
    executor.request_counts()
    executor.forget()
    assert asked[-1] == "forget" and not executor.reports()
    executor.check()
    executor.close()
    executor.close()


def test_it_needs_no_messages():
    code = (
        "import sys, moe_runtime.cluster.in_process; "
        "print(*{'zmq', 'msgspec', 'fastapi', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
