"""The executor of a single rank that lives in the caller's process."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.wire.executor import CountsReport, RankInfo
from moe_runtime.wire.messages import RankResult, SlotReport, SlotTask, StepPlan
from moe_runtime.worker.rank_step import PreparedStep
from moe_runtime.worker.worker import Worker

if TYPE_CHECKING:
    import numpy as np


class InProcessExecutor:
    """An `Executor` of one rank without processes or messages. Errors of the worker pass through unchanged.

    A step is prepared when it is submitted. It begins when the previous step has been collected, or at once if there is
    none. So the caller plans and prepares one step while another runs.
    """

    max_inflight = 2

    def __init__(self, config: EngineConfig, model_config: ModelConfig, path: Path) -> None:
        assert config.ep_size == 1
        self._worker: Worker | None = Worker(config, model_config, path)
        self._todo: deque[PreparedStep | None] = deque()  # in the order of the calls; None asks for counts
        self._is_running = False  # a step that has begun
        self._counts: list[CountsReport | SlotReport] = []
        self.ranks: list[RankInfo] = [self._worker.info]

    def submit(self, plan: StepPlan) -> None:
        assert self._worker is not None
        self._todo.append(self._worker.prepare(plan.of_rank(0)))
        self._get_on()

    def collect(self) -> list[RankResult]:
        assert self._worker is not None and self._is_running
        result = self._worker.finish()
        self._is_running = False
        self._get_on()
        return [result]

    def _get_on(self) -> None:
        """Work through the queue until a step runs."""
        assert self._worker is not None
        while self._todo and not self._is_running:
            step = self._todo.popleft()
            if step is None:
                self._counts.append(CountsReport(0, self._worker.expert_counts()))
            else:
                self._worker.begin(step)
                self._is_running = True

    def expert_counts(self) -> np.ndarray:
        assert self._worker is not None
        return self._worker.expert_counts()[None]

    def forget(self) -> None:
        assert self._worker is not None and not self._todo and not self._is_running
        self._worker.forget()
        self._counts.clear()

    def request_counts(self) -> None:
        self._todo.append(None)
        self._get_on()

    def send_task(self, rank: int, task: SlotTask) -> None:
        raise AssertionError("a single rank holds every expert")

    def reports(self) -> list[CountsReport | SlotReport]:
        reports, self._counts = self._counts, []
        return reports

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._worker = None
