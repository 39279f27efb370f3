"""The front's executor: every rank is a process of its own, and two steps may be under way."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_runtime.config import EngineConfig, ModelConfig
from moe_runtime.executor import RankInfo
from moe_runtime.host import RANK_COMMAND
from moe_runtime.messages import RankResult, StepPlan
from moe_runtime.rank_group import RankGroup, Site, single_host_site
from moe_runtime.transport import Counts, CountsRequest, Plan, Result


class ProcessExecutor:
    """An `Executor` of `config.ep_size` rank processes, which it starts, unless `site` says that they have other hosts.

    Belongs to one thread at a time. Dropped or left at the interpreter's end, it closes itself.

    Args:
        config, model_config, path: as for `Worker`; every rank gets the same.
        site: where the ranks live.
        command: starts a rank's process.

    Raises:
        ValueError: a rank refused the model or the configuration.
        RankError: a rank died or failed otherwise; from the constructor as from every other method but `close`.
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
        self._group = RankGroup(site, command)
        try:
            self.ranks: list[RankInfo] = self._group.start(config, model_config, path)
        except BaseException:
            self._group.close(kill=True)
            raise
        self._finalizer = weakref.finalize(self, self._group.close)

    def submit(self, plan: StepPlan) -> None:
        assert len(self._steps) < self.max_inflight and len(plan.ranks) == len(self.ranks)
        for rank, share in enumerate(plan.ranks):
            self._group.send(rank, Plan(replace(plan, ranks=[share])))
        self._steps.append(plan.step)
        self._results[plan.step] = {}

    def collect(self) -> list[RankResult]:
        step = self._steps[0]
        results = self._results[step]
        deadline = time.monotonic() + self._step_timeout
        while len(results) < len(self.ranks):
            match self._group.receive(deadline):
                case Result(result):
                    self._results[result.step][result.rank] = result
                case None:
                    late = set(range(len(self.ranks))) - results.keys()
                    self._group.fail_silent(f"step {step} did not end", self._step_timeout, late)
                case message:
                    raise AssertionError(f"a rank in step {step} sent {message!r}")
        self._steps.popleft()
        del self._results[step]
        return [results[rank] for rank in range(len(self.ranks))]

    def expert_counts(self) -> np.ndarray:
        assert not self._steps
        counts: dict[int, np.ndarray] = {}
        for rank in range(len(self.ranks)):
            self._group.send(rank, CountsRequest())
        deadline = time.monotonic() + self._step_timeout
        while len(counts) < len(self.ranks):
            match self._group.receive(deadline):
                case Counts() as answer:
                    counts[answer.rank] = answer.to_array()
                case None:
                    late = set(range(len(self.ranks))) - counts.keys()
                    self._group.fail_silent("expert counts did not come", self._step_timeout, late)
                case message:
                    raise AssertionError(f"a rank asked for its counts sent {message!r}")
        total: np.ndarray = np.stack(list(counts.values())).sum(axis=0)
        return total

    def check(self) -> None:
        self._group.check()

    def close(self) -> None:
        self._finalizer()
