"""What the front knows of the load: counts of all ranks, their averages, and measured layers. No torch.

Ranks never reset their counts. A `Window`, the load of some steps, is the difference of two counts. Each count belongs
to a number of steps, which identifies a count that arrives late.

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

MAX_SAMPLES = 2000  # measured layers to which the cost model is fitted
MIN_SAMPLES = 24
STEP_SHARE = 0.1  # weight of the newest step in the average
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Window:
    """The load between two counts, or since the start.

    Attributes:
        counts_W2LE: tokens of the sequences on each rank, per phase, layer and expert.
        num_steps: all steps.
        phase_steps: int64 [2], steps that had prefill, and steps that had decode.
        seconds: elapsed time, including time without steps.
    """

    counts_W2LE: Ints
    num_steps: int
    phase_steps: Ints
    seconds: float

    def since(self, earlier: Window) -> Window:
        """The load after `earlier`; both windows have the same start."""
        return Window(
            self.counts_W2LE - earlier.counts_W2LE,
            self.num_steps - earlier.num_steps,
            self.phase_steps - earlier.phase_steps,
            self.seconds - earlier.seconds,
        )

    def demand(self, horizon_seconds: float) -> dict[str, Demand]:
        """The steps of each phase within a horizon, if the load continues as in this window."""
        repeats = horizon_seconds / max(self.seconds, 1e-3)
        return {
            phase: Demand(rows=tokens_LE / steps, num_steps=steps * repeats)
            for phase, tokens_LE, steps in zip(
                PHASES, self.counts_W2LE.sum(axis=0), self.phase_steps.tolist(), strict=True
            )
            if steps
        }


class LoadMonitor:
    """Asks ranks for their counts, and collects these and what steps measure.

    Args:
        executor: runs the engine's ranks.
        shape: (L, E).
        fast_steps, slow_steps: time constants of the averages.

    Attributes:
        averages: tokens per step, fast and slow.
        total: everything up to the latest counts.
        num_steps: planned steps.
        step_seconds: moving average of a step's duration.
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
        self._asked: deque[tuple[int, Ints, float]] = deque()  # steps, phase steps, seconds at each request
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
        """Record what ranks measured in a step."""
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
        """Take a rank's answer. After the last rank's answer, returns the window since the latest counts.

        Returns None while answers are missing, or if later counts are already here.
        """
        self._reports[report.rank].append(report.counts_2LE)
        if not all(self._reports):
            return None
        return self._take(np.stack([reports.popleft() for reports in self._reports]), *self._asked.popleft())

    def take_counts(self, counts_W2LE: Ints) -> Window | None:
        """Take counts of all ranks after all steps. Returns the window since the latest counts, None without a step."""
        return self._take(counts_W2LE, *self._now())

    def layer_time(self) -> LayerTime | None:
        """How long a sparse layer takes, fitted to recent steps; None while too few layers were measured."""
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
