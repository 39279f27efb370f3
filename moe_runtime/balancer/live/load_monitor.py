"""What the front knows of the load: counts of all ranks, their averages, and measured layers. No torch.

Ranks count without end. What happened in some steps, a `Window`, is the difference of two counts; both are taken as of
a number of steps, so one that arrives late is known by it.

Shape suffixes: L MoE layers, W ranks, E logical experts; 2 is for prefill and decode.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.averages import LoadAverages
from moe_runtime.balancer.cost import LayerTime
from moe_runtime.balancer.decide import Demand
from moe_runtime.wire.executor import CountsReport, Executor
from moe_runtime.wire.messages import RankResult, StepPlan

Ints = npt.NDArray[np.int64]

MAX_SAMPLES = 2000  # measured layers that the cost model is fitted to
MIN_SAMPLES = 24
STEP_SHARE = 0.1  # of a step in the average
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Window:
    """What happened from one count to another, or from the start.

    Attributes:
        counts_W2LE: tokens that live on a rank, per phase, layer and expert.
        num_steps: all steps.
        phase_steps: int64 [2], those that had prefill, and those that had decode.
        seconds: of time, also without steps.
    """

    counts_W2LE: Ints
    num_steps: int
    phase_steps: Ints
    seconds: float

    def since(self, earlier: Window) -> Window:
        """What happened after `earlier`, both from the same start."""
        return Window(
            self.counts_W2LE - earlier.counts_W2LE,
            self.num_steps - earlier.num_steps,
            self.phase_steps - earlier.phase_steps,
            self.seconds - earlier.seconds,
        )

    def demand(self, horizon_seconds: float) -> dict[str, Demand]:
        """What steps of each phase that occurred there would do within a horizon, if it went on like that."""
        repeats = horizon_seconds / max(self.seconds, 1e-3)
        return {
            phase: Demand(rows=tokens_LE / steps, num_steps=steps * repeats)
            for phase, tokens_LE, steps in zip(
                PHASES, self.counts_W2LE.sum(axis=0), self.phase_steps.tolist(), strict=True
            )
            if steps
        }


class LoadMonitor:
    """Asks ranks for their counts, and takes in what they and the steps tell.

    Args:
        executor: its ranks.
        shape: (L, E).
        fast_steps, slow_steps: time constants of the averages.

    Attributes:
        averages: tokens per step, fast and slow.
        total: everything up to the latest counts.
        num_steps: that have been planned.
        step_seconds: of a step of late.
    """

    def __init__(self, executor: Executor, shape: tuple[int, int], fast_steps: float, slow_steps: float) -> None:
        self._executor = executor
        num_ranks = len(executor.ranks)
        self.averages = LoadAverages((2, *shape), fast_steps, slow_steps)
        self.num_steps = 0
        self.step_seconds = 0.0
        self.total = Window(np.zeros((num_ranks, 2, *shape), np.int64), 0, np.zeros(2, np.int64), 0.0)
        self._phase_steps = np.zeros(2, np.int64)
        self._started = time.monotonic()
        self._asked: deque[tuple[int, Ints, float]] = deque()  # as of when, for every time that ranks were asked
        self._reports: list[deque[Ints]] = [deque() for _ in range(num_ranks)]  # a rank answers in order
        self._samples: deque[tuple[list[int], list[int], float]] = deque(maxlen=MAX_SAMPLES)

    @property
    def is_waiting(self) -> bool:
        """Whether ranks have been asked and not all have answered."""
        return bool(self._asked)

    @property
    def steps_since(self) -> int:
        """Steps planned since the latest counts."""
        return self.num_steps - self.total.num_steps

    def note_plan(self, plan: StepPlan) -> None:
        """Count a step that will run."""
        self.num_steps += 1
        has_prefill = any(len(work.chunks) > work.num_decode for work in plan.ranks)
        has_decode = any(work.num_decode for work in plan.ranks)
        self._phase_steps = self._phase_steps + np.array([has_prefill, has_decode])

    def note_results(self, results: list[RankResult]) -> None:
        """Take in what ranks measured in a step."""
        seconds = max(result.seconds for result in results)
        self.step_seconds += STEP_SHARE * (seconds - self.step_seconds)
        if results[0].expert_work:
            for layer in zip(*(result.expert_work for result in results), strict=True):
                slowest = max(work.seconds for work in layer)
                self._samples.append(([work.touched_slots for work in layer], [work.rows for work in layer], slowest))

    def ask(self) -> None:
        """Ask ranks for their counts; they come as reports."""
        self._asked.append(self._now())
        self._executor.request_counts()

    def take_report(self, report: CountsReport) -> Window | None:
        """A rank's answer; the window since the latest counts once all have answered, unless later ones are here."""
        self._reports[report.rank].append(report.counts_2LE)
        if not all(self._reports):
            return None
        return self._take(np.stack([reports.popleft() for reports in self._reports]), *self._asked.popleft())

    def take_counts(self, counts_W2LE: Ints) -> Window | None:
        """Counts of all ranks after all steps; the window since the latest, None if there was no step."""
        return self._take(counts_W2LE, *self._now())

    def layer_time(self) -> LayerTime | None:
        """How long a sparse layer takes, fitted to steps of late; None while too few were measured."""
        if len(self._samples) < MIN_SAMPLES:
            return None
        touched, rows, seconds = zip(*self._samples, strict=True)
        return LayerTime.fit(touched, rows, seconds)

    def _now(self) -> tuple[int, Ints, float]:
        return self.num_steps, self._phase_steps, time.monotonic() - self._started

    def _take(self, counts_W2LE: Ints, num_steps: int, phase_steps: Ints, seconds: float) -> Window | None:
        if num_steps <= self.total.num_steps:
            return None
        before, self.total = self.total, Window(counts_W2LE, num_steps, phase_steps, seconds)
        window = self.total.since(before)
        self.averages.add(window.counts_W2LE.sum(axis=0), window.num_steps)
        return window
