"""The front's side of balancing: decides when experts move, and tells the ranks where tokens go. No torch.

`load_monitor.py` watches the load, `mover.py` carries moves out, `replica_table.py` shares tokens among replicas.

The engine passes every plan through `prepare` and calls `tick` between steps. No call here blocks.

Shape suffixes: L MoE layers, W ranks, E logical experts.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.decide import Decision, MoveCost, Payback, balancedness
from moe_runtime.balancer.eplb import plan_eplb
from moe_runtime.balancer.live.load_monitor import LoadMonitor, Window
from moe_runtime.balancer.live.mover import Mover, Rebalance
from moe_runtime.balancer.live.replica_table import ReplicaTables
from moe_runtime.balancer.plan import Plan, plan_placement
from moe_runtime.balancer.shift import Shift, ShiftDetector
from moe_runtime.balancer.split import rank_loads
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.memory.initial_placement import initial_placement, slots_per_rank
from moe_runtime.memory.model_size import expert_bytes
from moe_runtime.wire.executor import CountsReport, Executor
from moe_runtime.wire.messages import RankResult, StepPlan

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

logger = logging.getLogger(__name__)

HORIZON_SECONDS = 60.0  # the longest time in which a move must pay back
FAST_INTERVALS, SLOW_INTERVALS = 2, 20  # time constants of the averages, in balance intervals
ROUTE_STEPS = 8  # steps between two checks of how replicas share their tokens
MEASURE_EVERY = 8  # ranks time their experts once in this many steps
KEPT_DECISIONS = 200


@dataclass(frozen=True)
class BalancerStats:
    """Counts since the start, and figures of the recent load.

    `balancedness` is mean rank load / max rank load of the fast average. `balancedness_slow` is the same of the slow
    average. If it is near 1 and `balancedness` is not, the load has just changed, or a burst is passing.
    `rank_rows_per_step` are the rows that each rank's experts compute.
    """

    placement_version: int
    moves: int
    copied_bytes: int
    rollbacks: int
    balancedness: float
    balancedness_slow: float
    rank_rows_per_step: list[float]
    is_migrating: bool


class Rebalancer:
    """Owns the placement.

    Args:
        config, model: as for the engine.
        executor: runs the engine's ranks.

    Attributes:
        placement: where the experts are.
        decisions: the balancer's latest decisions, newest last, as plain figures.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, executor: Executor) -> None:
        self._config, self._executor = config, executor
        self._num_ranks = len(executor.ranks)
        self._expert_bytes = expert_bytes(model, executor.ranks[0].dtype)
        self._num_slots = slots_per_rank(config, model, self._num_ranks)
        self.placement = initial_placement(config, model, self._num_ranks)
        self.decisions: deque[dict[str, Any]] = deque(maxlen=KEPT_DECISIONS)
        shape = (self.placement.num_layers, self.placement.num_experts)
        interval = config.balance_interval
        self._monitor = LoadMonitor(executor, shape, FAST_INTERVALS * interval, SLOW_INTERVALS * interval)
        self._looked = self._monitor.total  # at the last look
        self._known_LE = np.zeros(shape)  # recent rows per step, at the last look
        self._began = 0.0  # seconds on the monitor's clock: the load last changed, or experts last moved
        self._shifts = ShiftDetector(SLOW_INTERVALS)
        self._payback = Payback()
        self._mover = Mover(executor, self._num_slots, self._expert_bytes, config.migration_bytes_per_step)
        self._replica_tables = ReplicaTables(self.placement)
        # load of each rank in each layer by the averages; recomputed when an average or the placement changes
        self._fast_LW, self._slow_LW = np.zeros((2, shape[0], self._num_ranks))

    @property
    def is_migrating(self) -> bool:
        """Whether experts are moving, so that `tick` must be called even without steps."""
        return self._mover.is_moving

    def stats(self) -> BalancerStats:
        """Counts since the start and recent figures; cheap."""
        return BalancerStats(
            placement_version=self.placement.version,
            moves=self._mover.moves,
            copied_bytes=self._mover.copied_bytes,
            rollbacks=self._mover.rollbacks,
            balancedness=balancedness(self._fast_LW),
            balancedness_slow=balancedness(self._slow_LW),
            rank_rows_per_step=self._fast_LW.sum(axis=0).tolist(),
            is_migrating=self.is_migrating,
        )

    def prepare(self, plan: StepPlan) -> StepPlan:
        """The plan, completed with new replica choices and with whether ranks measure this step."""
        self._monitor.note_plan(plan)
        news = self._replica_tables.take_news()
        if news is not None:
            plan = replace(
                plan,
                ranks=[replace(work, replica_choices=choices) for work, choices in zip(plan.ranks, news, strict=True)],
            )
        measure = self._watches and self._monitor.num_steps % MEASURE_EVERY == 0
        return replace(plan, measure=measure)

    def note(self, results: list[RankResult]) -> None:
        """Record what ranks measured in a step."""
        self._monitor.note_results(results)

    def tick(self, idle: bool = False) -> None:
        """Work between two steps: take reports, continue a migration, and look at the load once in an interval.

        Without requests (`idle`), copies delay no request, so ranks copy in large pieces.
        """
        self._take_reports()
        if self._mover.is_moving:
            self._move(idle)
        if self._monitor.total.num_steps - self._looked.num_steps >= self._config.balance_interval:
            self._look()
        self._replica_tables.advance()
        if not self._monitor.is_waiting and self._monitor.steps_since >= self._steps_between_counts:
            self._monitor.ask()

    def begin(self, dry_run: bool = False) -> Rebalance:
        """Plan for the recent load and, unless `dry_run`, start moving.

        Raises:
            ValueError: there is one rank, or a migration is under way.
        """
        if self._num_ranks == 1:
            raise ValueError("rebalance: is not possible with ep_size 1; one rank holds every expert")
        if self._mover.is_moving:
            raise ValueError("rebalance: a migration is under way; wait until it has ended")
        rows_LE = self._rows()
        plan = self._plan(rows_LE)
        rebalance = self._rebalance(plan, rows_LE, dry_run)
        if dry_run:
            rebalance.done = True
        else:
            self._start(plan, rebalance)
        return rebalance

    def take_counts(self, counts_W2LE: Ints) -> None:
        """Take counts that `Executor.expert_counts` returned after all steps."""
        self._take_reports()  # of counts that were requested earlier
        if (window := self._monitor.take_counts(counts_W2LE)) is not None:
            self._replica_tables.weigh(window.counts_W2LE.sum(axis=1))
        self._weigh()

    @property
    def _watches(self) -> bool:
        return self._config.balance != "off"

    @property
    def _steps_between_counts(self) -> float:
        """Few if replicas share tokens by the counts, more if only the balancer uses them, infinite if nothing does."""
        interval = self._config.balance_interval
        if self._replica_tables.has_replicas:
            return min(ROUTE_STEPS, interval)
        return interval if self._watches else math.inf

    def _take_reports(self) -> None:
        for report in self._executor.reports():
            if not isinstance(report, CountsReport):
                self._mover.take(report)
            elif (window := self._monitor.take_report(report)) is not None:
                self._replica_tables.weigh(window.counts_W2LE.sum(axis=1))

    def _look(self) -> None:
        """Once in an interval: check whether the load is new, how even it is, and whether experts should move."""
        before, self._looked = self._looked, self._monitor.total
        window = self._looked.since(before)
        shift = self._shifts.compare(self._known_LE, window.counts_W2LE.sum(axis=(0, 1)))
        if shift.is_new:
            self._monitor.averages.restart_fast(window.counts_W2LE.sum(axis=0), window.num_steps)
            self._began = before.seconds
        self._weigh()
        self._replica_tables.refresh()
        if self._watches and not self._mover.is_moving:
            self._decide(window, shift)
        self._known_LE = self._rows()

    def _decide(self, window: Window, shift: Shift) -> None:
        """Evaluate a plan, and carry it out if it pays back.

        The plan is made for the load up to the last look. Its saving is computed on the steps since then, which the
        plan has not seen. On the steps it was made for, the saving would look too large, because the plan also fits
        their noise.

        The horizon is the time since the load changed or experts last moved, capped at 60 s. So experts move once the
        plan could already have saved what the margin asks for. Whatever load follows, waiting and useless moves
        together cost at most 1 + margin times the least possible cost with the future known (the ski rental problem;
        Karlin et al. 1988).
        """
        if self._config.balance == "eplb":
            rows_LE = self._rows()
            plan = self._plan(rows_LE)
            if plan.moves:
                self._start(plan, self._rebalance(plan, rows_LE))
            return
        layer_time = self._monitor.layer_time()
        if layer_time is None:
            return
        horizon = min(self._looked.seconds - self._began, HORIZON_SECONDS)
        decision = self._payback.decide(
            self.placement,
            lambda: self._plan(self._known_LE),
            window.demand(horizon),
            layer_time,
            MoveCost(self._expert_bytes, self._mover.copy_rate),
            is_new=shift.is_new,
        )
        self._log(decision, shift, horizon)
        if decision.moves_experts:
            assert decision.plan is not None
            self._start(decision.plan, self._rebalance(decision.plan, self._rows()))

    def _start(self, plan: Plan, rebalance: Rebalance) -> None:
        """Start the moves of a plan."""
        self._began = self._monitor.total.seconds
        self._mover.start(self.placement, plan.placement, rebalance)

    def _log(self, decision: Decision, shift: Shift, horizon: float) -> None:
        figures = decision.to_dict() | {
            "horizon_seconds": horizon,
            "shift": shift.distance,
            "shift_limit": shift.limit,
            "balancedness_slow": balancedness(self._slow_LW),
            "step": self._monitor.num_steps,
            "version": self.placement.version,
        }
        self.decisions.append(figures)
        logger.log(logging.INFO if decision.moves_experts else logging.DEBUG, "balancer: %s", decision)

    def _rows(self) -> Floats:
        """Recent rows per step, layer and expert, both phases together."""
        rows_LE: Floats = self._monitor.averages.fast.sum(axis=0)
        return rows_LE

    def _rebalance(self, plan: Plan, rows_LE: Floats, dry_run: bool = False) -> Rebalance:
        before, after = (balancedness(rank_loads(rows_LE, where.slots)) for where in (self.placement, plan.placement))
        return Rebalance(dry_run, before, after, len(plan.moves))

    def _plan(self, rows_LE: Floats) -> Plan:
        """A plan from the current placement, for all slots except the shadow slots."""
        num_slots = [count - 1 for count in self._num_slots]
        current = self.placement.in_slots(num_slots)
        if self._config.balance == "eplb":
            return plan_eplb(rows_LE, self._num_ranks, num_slots, current)
        return plan_placement(rows_LE, self._num_ranks, num_slots, current)

    def _move(self, idle: bool) -> None:
        """Continue a migration."""
        placement = self._mover.tick(self._monitor.step_seconds, idle)
        if placement is not None:
            self.placement = placement
            self._weigh(self._replica_tables.place(placement))
        if (rebalance := self._mover.take_finished()) is not None:
            rebalance.balancedness_after = balancedness(self._fast_LW)
            logger.info("experts have moved: %s", rebalance)
            if self.decisions and self.decisions[-1].get("moves_experts"):
                self.decisions[-1]["outcome"] = rebalance.to_dict()

    def _weigh(self, layers: npt.NDArray[np.intp] | slice = slice(None)) -> None:
        """Recompute the load of each rank, after the averages or the placement of layers has changed."""
        slots_LWS, averages = self.placement.slots[layers], self._monitor.averages
        self._fast_LW[layers] = rank_loads(averages.fast.sum(axis=0)[layers], slots_LWS)
        self._slow_LW[layers] = rank_loads(averages.slow.sum(axis=0)[layers], slots_LWS)
