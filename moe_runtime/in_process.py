"""The executor of a single rank that lives in the caller's process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.config import EngineConfig, ModelConfig
from moe_runtime.executor import CountsReport, RankInfo
from moe_runtime.messages import RankResult, SlotReport, SlotTask, StepPlan
from moe_runtime.worker import Worker

if TYPE_CHECKING:
    import numpy as np


class InProcessExecutor:
    """An `Executor` of one rank without processes or messages; errors of the worker pass through as they are."""

    max_inflight = 1

    def __init__(self, config: EngineConfig, model_config: ModelConfig, path: Path) -> None:
        assert config.ep_size == 1
        self._worker: Worker | None = Worker(config, model_config, path)
        self._result: RankResult | None = None
        self._counts: list[CountsReport | SlotReport] = []
        self.ranks: list[RankInfo] = [self._worker.info]

    def submit(self, plan: StepPlan) -> None:
        assert self._worker is not None and self._result is None
        self._result = self._worker.step(plan)

    def collect(self) -> list[RankResult]:
        assert self._result is not None
        result, self._result = self._result, None
        return [result]

    def expert_counts(self) -> np.ndarray:
        assert self._worker is not None
        return self._worker.expert_counts()[None]

    def request_counts(self) -> None:
        assert self._worker is not None
        self._counts.append(CountsReport(0, self._worker.expert_counts()))

    def send_task(self, rank: int, task: SlotTask) -> None:
        raise AssertionError("a single rank holds every expert")

    def reports(self) -> list[CountsReport | SlotReport]:
        reports, self._counts = self._counts, []
        return reports

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._worker = None
