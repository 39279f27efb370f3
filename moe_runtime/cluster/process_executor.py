"""The front's executor: every rank is a process of its own, and two steps may be in flight."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_runtime.cluster.host import RANK_COMMAND
from moe_runtime.cluster.rank_group import RankGroup, Site, single_host_site
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.wire.executor import CountsReport, RankInfo
from moe_runtime.wire.messages import RankResult, SlotReport, SlotTask, StepPlan
from moe_runtime.wire.transport import Counts, CountsRequest, Forget, Message, Result, RunStep, Task, TaskReport

REPORT = 0  # request id of counts for `reports`; no call waits for them


class ProcessExecutor:
    """An `Executor` of `config.ep_size` rank processes. It starts them, except those that have other hosts in `site`.

    Belongs to one thread at a time. It closes itself when it is garbage-collected or when the interpreter ends.

    Args:
        config, model_config, path: as for `Worker`; every rank gets the same.
        site: where the ranks live.
        command: starts the process that forks into the ranks.

    Raises:
        ValueError: a rank refused the model or the configuration.
        RankError: a rank died or failed otherwise. The constructor and every method except `close` raise it.
    """

    max_inflight = 2

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        path: Path,
        site: Site | None = None,
        command: Sequence[str] = RANK_COMMAND,
    ) -> None:
        site = site or single_host_site(config.ep_size)
        assert site.num_ranks == config.ep_size
        self._step_timeout = config.step_timeout
        self._steps: deque[int] = deque()
        self._results: dict[int, dict[int, RankResult]] = {}
        self._counts_asked = REPORT
        self._answers: dict[int, dict[int, np.ndarray]] = {}
        self._reports: list[CountsReport | SlotReport] = []
        self._group = RankGroup(site, command)
        try:
            self.ranks: list[RankInfo] = self._group.start(config, model_config, path)
        except BaseException:
            self._group.close(kill=True)
            raise
        self._finalizer = weakref.finalize(self, self._group.close)

    def submit(self, plan: StepPlan) -> None:
        assert len(self._steps) < self.max_inflight and len(plan.ranks) == len(self.ranks)
        for rank in range(len(plan.ranks)):
            self._group.send(rank, RunStep(plan.of_rank(rank)))
        self._steps.append(plan.step)
        self._results[plan.step] = {}

    def collect(self) -> list[RankResult]:
        step = self._steps[0]
        results = self._results[step]
        self._await(lambda: self._missing(results), f"step {step} did not end")
        self._steps.popleft()
        del self._results[step]
        return [results[rank] for rank in range(len(self.ranks))]

    def expert_counts(self) -> np.ndarray:
        assert not self._steps
        self._counts_asked += 1
        asked = self._counts_asked
        answers = self._answers[asked] = {}
        for rank in range(len(self.ranks)):
            self._group.send(rank, CountsRequest(asked))
        self._await(lambda: self._missing(answers), "expert counts did not come")
        del self._answers[asked]
        return np.stack([answers[rank] for rank in range(len(self.ranks))])

    def forget(self) -> None:
        for rank in range(len(self.ranks)):
            self._group.send(rank, Forget())
        self.expert_counts()  # a rank's answers come in order, so no earlier report is still on its way
        self._reports.clear()

    def request_counts(self) -> None:
        for rank in range(len(self.ranks)):
            self._group.send(rank, CountsRequest(REPORT))

    def send_task(self, rank: int, task: SlotTask) -> None:
        self._group.send(rank, Task(task))

    def reports(self) -> list[CountsReport | SlotReport]:
        while (message := self._group.receive(0.0)) is not None:
            self._sort(message)
        reports, self._reports = self._reports, []
        return reports

    def _missing(self, answers: Mapping[int, object]) -> set[int]:
        return set(range(len(self.ranks))) - answers.keys()

    def _await(self, missing: Callable[[], set[int]], otherwise: str) -> None:
        """Receive messages until no rank's answer is missing, within the deadline of a step."""
        deadline = time.monotonic() + self._step_timeout
        while late := missing():
            message = self._group.receive(deadline)
            if message is None:
                self._group.fail_silent(otherwise, self._step_timeout, late)
            self._sort(message)

    def _sort(self, message: Message) -> None:
        match message:
            case Result(result):
                self._results[result.step][result.rank] = result
            case Counts() as counts if counts.request_id == REPORT:
                self._reports.append(CountsReport(counts.rank, counts.to_array()))
            case Counts() as counts:
                self._answers[counts.request_id][counts.rank] = counts.to_array()
            case TaskReport(report):
                self._reports.append(report)
            case _:
                raise AssertionError(f"a rank at work sent {message!r}")

    def check(self) -> None:
        self._group.check()

    def close(self) -> None:
        self._finalizer()
