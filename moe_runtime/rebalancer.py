"""The front's side of balancing: watches the load, decides, migrates, and tells the ranks where tokens go. No torch.

The engine hands every plan through `prepare` and calls `tick` between steps; all waiting is done by others.

Shape suffixes: L MoE layers, W ranks, E logical experts; 2 is for prefill and decode.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.averages import LoadAverages
from moe_runtime.balancer.cost import LayerTime
from moe_runtime.balancer.decide import Decision, Demand, MoveCost, Payback, balancedness
from moe_runtime.balancer.eplb import plan_eplb
from moe_runtime.balancer.placement import Placement
from moe_runtime.balancer.plan import Plan, plan_placement
from moe_runtime.balancer.split import split_tokens
from moe_runtime.config import EngineConfig, ModelConfig
from moe_runtime.executor import CountsReport, Executor
from moe_runtime.messages import RankResult, StepPlan
from moe_runtime.migration import Migration
from moe_runtime.placements import initial_placement
from moe_runtime.routes import Routes

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

HORIZON_SECONDS = 60.0  # within which a move must pay back
FAST_INTERVALS, SLOW_INTERVALS = 2, 20  # time constants of the averages, in looks at the load
MEASURE_EVERY = 8  # steps; so often ranks time their experts
MAX_SAMPLES = 2000  # measured layers that the cost model is fitted to
MIN_SAMPLES = 24
FIRST_COPY_RATE = 5e8  # bytes per second, until a copy was measured
COPY_SHARE, LEAST_COPY = 0.15, 256 << 10  # of a step's time, unless it is a few bytes
IDLE_COPY = 64 << 20
STEP_SHARE = 0.1  # of a step in the average
REPORT_TIMEOUT = 120.0
KEPT_DECISIONS = 200


@dataclass
class Rebalance:
    """A change of the placement that was asked for, or that the balancer decided on.

    `moves` and what follows is filled in when it is `done`; with `dry_run` it is done at once, and nothing has moved.
    """

    dry_run: bool
    balancedness_before: float
    balancedness_planned: float
    planned_moves: int
    done: bool = False
    moves: list[dict[str, int]] | None = None
    copied_bytes: int = 0
    rollbacks: list[str] | None = None
    seconds: float = 0.0
    balancedness_after: float | None = None
    placement_version: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        return dict(vars(self))


@dataclass(frozen=True)
class BalancerStats:
    """Counts since the start, and of late: mean rank load / max rank load, and rows that a rank's experts compute."""

    placement_version: int
    moves: int
    copied_bytes: int
    rollbacks: int
    balancedness: float
    rank_rows_per_step: list[float]
    is_migrating: bool


class Rebalancer:
    """Owns the placement.

    Args:
        config, model: as for the engine.
        executor: its ranks.

    Attributes:
        placement: where the experts are.
        decisions: the last ones of the balancer, newest last, as plain figures.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, executor: Executor) -> None:
        self._config, self._model, self._executor = config, model, executor
        self._num_ranks = len(executor.ranks)
        self.placement = initial_placement(config, model, self._num_ranks)
        self.decisions: deque[dict[str, Any]] = deque(maxlen=KEPT_DECISIONS)
        num_layers, num_experts = self.placement.num_layers, self.placement.num_experts
        interval = config.balance_interval
        self._averages = LoadAverages(
            (2, num_layers, num_experts), FAST_INTERVALS * interval, SLOW_INTERVALS * interval
        )
        self._recent_WLE: Ints = np.zeros((self._num_ranks, num_layers, num_experts), np.int64)
        self._counted_W2LE: Ints = np.zeros((self._num_ranks, 2, num_layers, num_experts), np.int64)
        self._reports: dict[int, Ints] = {}
        self._num_steps = self._looked_at = self._steps_reported = 0
        self._phase_steps = np.zeros(2, np.int64)
        self._looked_when = time.monotonic()
        self._samples: deque[tuple[list[int], list[int], float]] = deque(maxlen=MAX_SAMPLES)
        self._payback = Payback()
        self._copy_rate = FIRST_COPY_RATE
        self._step_seconds = 0.0  # of late
        self._is_idle = False
        self._migration: Migration | None = None
        self._current: Rebalance | None = None
        self._next_task = 0
        self._moves = self._copied_bytes = self._rollbacks = 0
        self._routes = Routes(self.placement)
        self._update_routes()

    @property
    def is_migrating(self) -> bool:
        """Whether experts are on their way, so that `tick` must be called also without steps."""
        return self._migration is not None

    def stats(self) -> BalancerStats:
        """Figures since the start and of late; cheap."""
        return BalancerStats(
            placement_version=self.placement.version,
            moves=self._moves,
            copied_bytes=self._copied_bytes,
            rollbacks=self._rollbacks,
            balancedness=self._balancedness,
            rank_rows_per_step=self._rank_rows,
            is_migrating=self.is_migrating,
        )

    def prepare(self, plan: StepPlan) -> StepPlan:
        """The plan with the version of the placement, routes that are new, and whether to measure."""
        self._num_steps += 1
        for work in plan.ranks:
            if len(work.chunks) > work.num_decode:
                self._phase_steps[0] += 1
                break
        self._phase_steps[1] += any(work.num_decode for work in plan.ranks)
        news = self._routes.take_news()
        if news is not None:
            plan = replace(
                plan, ranks=[replace(work, routes=routes) for work, routes in zip(plan.ranks, news, strict=True)]
            )
        measure = self._watches and self._num_steps % MEASURE_EVERY == 0
        return replace(plan, placement_version=self.placement.version, measure=measure)

    def note(self, results: list[RankResult]) -> None:
        """Take in what ranks measured in a step."""
        seconds = max(result.seconds for result in results)
        self._step_seconds += STEP_SHARE * (seconds - self._step_seconds)
        if results[0].expert_work:
            for layer in zip(*(result.expert_work for result in results), strict=True):
                slowest = max(work.seconds for work in layer)
                self._samples.append(([work.touched_slots for work in layer], [work.rows for work in layer], slowest))

    def tick(self, idle: bool = False) -> None:
        """Between two steps: take reports in, get on with a migration, and now and then look at the load.

        Without requests (`idle`) copies delay nobody, and go on in large pieces.
        """
        self._is_idle = idle
        for report in self._executor.reports():
            if isinstance(report, CountsReport):
                self._reports[report.rank] = report.counts_2LE
                if len(self._reports) == self._num_ranks:
                    self._take_counts(np.stack([self._reports.pop(rank) for rank in range(self._num_ranks)]))
            elif self._migration is not None:
                self._migration.take(report)
        if self._migration is not None:
            if self._migration.tick():
                self.placement = self._migration.placement
                self._update_routes()
            if self._migration.done:
                self._end_migration()
        elif self._watches and self._num_steps - self._looked_at >= self._config.balance_interval:
            self._look()

    def begin(self, dry_run: bool = False) -> Rebalance:
        """Plan by the load of late and, unless `dry_run`, start moving.

        Raises:
            ValueError: there is one rank, or a migration is under way.
        """
        if self._num_ranks == 1:
            raise ValueError("rebalance: is not possible with ep_size 1; one rank holds every expert")
        if self._migration is not None:
            raise ValueError("rebalance: a migration is under way; wait until it has ended")
        rows_LE = self._averages.fast.sum(axis=0)
        plan = self._plan(rows_LE)
        rebalance = Rebalance(
            dry_run,
            balancedness(rows_LE, self.placement, None),
            balancedness(rows_LE, plan.placement, None),
            len(plan.moves),
        )
        if dry_run:
            rebalance.done = True
        else:
            self._start(plan.placement, rebalance)
        return rebalance

    def take_counts(self, counts_W2LE: Ints) -> None:
        """Counts that somebody has fetched anyway; `Executor.expert_counts`."""
        if self._num_steps > self._steps_reported:
            self._take_counts(counts_W2LE)

    @property
    def _watches(self) -> bool:
        return self._config.balance != "off"

    def _look(self) -> None:
        self._looked_at = self._num_steps
        self._executor.request_counts()

    def _take_counts(self, counts_W2LE: Ints) -> None:
        new_W2LE = counts_W2LE - self._counted_W2LE
        num_steps = self._num_steps - self._steps_reported
        self._counted_W2LE, self._steps_reported = counts_W2LE, self._num_steps
        if num_steps < 1 or not new_W2LE.any():
            return
        self._averages.add(new_W2LE.sum(axis=0), num_steps)
        self._recent_WLE = new_W2LE.sum(axis=1)
        self._update_routes()
        elapsed, self._looked_when = time.monotonic() - self._looked_when, time.monotonic()
        phase_steps, self._phase_steps = self._phase_steps, np.zeros(2, np.int64)
        if self._watches and self._migration is None:
            self._decide(new_W2LE.sum(axis=0), phase_steps, elapsed)

    def _decide(self, new_2LE: Ints, phase_steps: Ints, elapsed: float) -> None:
        """Weigh a plan, and carry it out where it pays back."""
        rows_LE = self._averages.fast.sum(axis=0)
        if self._config.balance == "eplb":
            plan = self._plan(rows_LE)
            if plan.moves:
                before, after = (balancedness(rows_LE, where, None) for where in (self.placement, plan.placement))
                self._start(plan.placement, Rebalance(False, before, after, len(plan.moves)))
            return
        if len(self._samples) < MIN_SAMPLES:
            return
        touched, rows, seconds = zip(*self._samples, strict=True)
        demand = {
            phase: Demand(rows=new_LE / steps, num_steps=float(steps * HORIZON_SECONDS / max(elapsed, 1e-3)))
            for phase, new_LE, steps in zip(("prefill", "decode"), new_2LE, phase_steps.tolist(), strict=True)
            if steps
        }
        decision = self._payback.decide(
            self.placement,
            lambda: self._plan(rows_LE),
            demand,
            LayerTime.fit(touched, rows, seconds),
            MoveCost(self._expert_bytes, self._copy_rate),
        )
        self._log(decision)
        if decision.moves_experts:
            assert decision.plan is not None and decision.planned_balancedness is not None
            rebalance = Rebalance(False, decision.balancedness, decision.planned_balancedness, len(decision.plan.moves))
            self._start(decision.plan.placement, rebalance)

    def _log(self, decision: Decision) -> None:
        self.decisions.append(decision.to_dict() | {"step": self._num_steps, "version": self.placement.version})
        level = logging.INFO if decision.moves_experts else logging.DEBUG
        logger.log(level, "balancer: %s", decision.to_dict())

    def _plan(self, rows_LE: npt.NDArray[np.float64]) -> Plan:
        """A plan from here, for all slots but the shadows."""
        num_slots = self.placement.max_slots - 1
        current = self.placement.in_slots(num_slots)
        if self._config.balance == "eplb":
            return plan_eplb(rows_LE, self._num_ranks, num_slots, current)
        return plan_placement(rows_LE, self._num_ranks, num_slots, current)

    def _start(self, target: Placement, rebalance: Rebalance) -> None:
        self._current = rebalance
        self._migration = Migration(
            self.placement,
            target,
            self._executor.send_task,
            expert_bytes=self._expert_bytes,
            budget=self._copy_budget,
            timeout=REPORT_TIMEOUT,
            first_task=self._next_task,
        )

    def _copy_budget(self) -> int:
        """Bytes that a rank may copy between two steps: what was asked for, or a share of a step's time."""
        if self._is_idle:
            return IDLE_COPY
        asked = self._config.migration_bytes_per_step
        return asked if asked is not None else max(LEAST_COPY, int(COPY_SHARE * self._step_seconds * self._copy_rate))

    def _end_migration(self) -> None:
        assert self._migration is not None and self._current is not None
        report, rebalance = self._migration.report, self._current
        self._next_task = self._migration.next_task
        self._migration = self._current = None
        self._moves += len(report.moves)
        self._copied_bytes += report.copied_bytes
        self._rollbacks += len(report.failures)
        if report.copied_bytes and report.copy_seconds > 0:
            self._copy_rate = report.copied_bytes / report.copy_seconds
        rebalance.moves = [vars(move) for move in report.moves]
        rebalance.copied_bytes = report.copied_bytes
        rebalance.rollbacks = report.failures
        rebalance.seconds = report.seconds or 0.0
        rebalance.balancedness_after = self._balancedness
        rebalance.placement_version = self.placement.version
        rebalance.done = True
        if self.decisions and self.decisions[-1].get("moves_experts"):
            self.decisions[-1]["outcome"] = rebalance.to_dict()
        logger.info("experts have moved: %s", {key: value for key, value in vars(rebalance).items() if key != "moves"})

    def _update_routes(self) -> None:
        """After the placement or the load has changed."""
        rows_LE = self._averages.fast.sum(axis=0)
        self._balancedness = balancedness(rows_LE, self.placement, None)
        self._rank_rows = self._rows_per_rank(rows_LE).tolist()
        if self._num_ranks > 1:
            self._routes.update(self.placement, self._recent_WLE)

    def _rows_per_rank(self, rows_LE: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        rows_W = np.zeros(self._num_ranks)
        for rows_E, slots_WS in zip(rows_LE, self.placement.slots, strict=True):
            rows_W += rows_E @ split_tokens(rows_E, slots_WS)
        return rows_W

    @property
    def _expert_bytes(self) -> int:
        itemsize = 4 if self._executor.ranks[0].dtype == "float32" else 2
        return 3 * self._model.hidden_size * self._model.moe.intermediate_size * itemsize
