"""Decides whether to move experts now: only if that pays back.

Shape suffixes: L MoE layers, W ranks, E logical experts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.cost import LayerTime
from moe_runtime.balancer.placement import Placement
from moe_runtime.balancer.plan import Move, Plan
from moe_runtime.balancer.split import rank_loads

Reason = Literal["pays back", "no load", "balanced", "new load", "nothing to move", "slower", "does not pay back"]


@dataclass(frozen=True)
class Demand:
    """The expected steps of one phase within the horizon.

    Attributes:
        rows: float [L, E], rows per layer and expert in one step.
        num_steps: steps of this phase within the horizon.
    """

    rows: npt.NDArray[np.float64]
    num_steps: float


@dataclass(frozen=True)
class MoveCost:
    """What moves cost: bytes / bandwidth measured on a rank, plus a time in which nothing else runs.

    Ranks copy in parallel, and all wait for the rank that copies most.
    """

    bytes_per_move: int
    bytes_per_second: float
    stall_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes_per_move < 0:
            raise ValueError(f"bytes_per_move: {self.bytes_per_move} is not allowed; it must be at least 0")
        if not 0 < self.bytes_per_second < np.inf:
            raise ValueError(f"bytes_per_second: {self.bytes_per_second} is not allowed; it must be finite and above 0")
        if not 0 <= self.stall_seconds < np.inf:
            raise ValueError(f"stall_seconds: {self.stall_seconds} is not allowed; it must be finite and at least 0")

    def seconds(self, moves: Iterable[Move]) -> float:
        """The cost of all moves together."""
        most = max(Counter(move.rank for move in moves).values(), default=0)
        return most * self.bytes_per_move / self.bytes_per_second + self.stall_seconds


@dataclass(frozen=True)
class Decision:
    """A decision and the figures that led to it; figures that were not needed are None.

    Attributes:
        moves_experts: whether `plan` must be carried out.
        reason: "pays back" if so, else the reason against it. "slower": the layers would take longer, because ranks
            would read more slots. "new load": the load has just begun or changed, and it is too early to tell whether
            it stays.
        at: time of the decision, on the clock of the `Payback`.
        balancedness: of the demand under the current placement, mean rank load / max rank load over all layers.
        planned_balancedness: the same under the plan.
        num_moves, num_bytes: of the plan.
        cost_seconds: what carrying out the plan costs.
        saving_seconds: what the plan saves within the horizon; below 0 if steps take longer.
        margin: the least allowed saving / cost.
        horizon_steps: steps within the horizon, of all phases.
        sparse_seconds: time of all sparse layers in all steps within the horizon, under the current placement.
        planned_sparse_seconds: the same under the plan.
        plan: the plan; `to_dict` leaves it out.
    """

    moves_experts: bool
    reason: Reason
    at: float
    balancedness: float
    planned_balancedness: float | None = None
    num_moves: int | None = None
    num_bytes: int | None = None
    cost_seconds: float | None = None
    saving_seconds: float | None = None
    margin: float | None = None
    horizon_steps: float | None = None
    sparse_seconds: float | None = None
    planned_sparse_seconds: float | None = None
    plan: Plan | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plan"}

    def __str__(self) -> str:
        """The figures in words, for the log."""
        text = (
            f"experts {'move' if self.moves_experts else 'stay'} ({self.reason}); balancedness {self.balancedness:.3f}"
        )
        if self.plan is None:
            return text
        return (
            f"{text}, planned {self.planned_balancedness:.3f}; {self.num_moves} moves cost {self.cost_seconds:.3f} s "
            f"and save {self.saving_seconds:.3f} s in {self.horizon_steps:.0f} steps"
        )


class Payback:
    """Decides when experts move, with hysteresis: between the two thresholds of balancedness, no balancing starts.

    Args:
        margin: the saving within the horizon must be more than this many times the cost.
        start_below: balancing starts when the balancedness falls below this.
        stop_above: balancing continues, plan after plan, until the balancedness reaches this.
        clock: seconds, monotonic.

    Raises:
        ValueError: a margin below 1, or thresholds out of order.
    """

    def __init__(
        self,
        margin: float = 1.5,
        start_below: float = 0.9,
        stop_above: float = 0.95,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 1 <= margin < np.inf:
            raise ValueError(f"margin: {margin} is not allowed; it must be finite and at least 1")
        if not 0 < start_below <= stop_above <= 1:
            raise ValueError(
                f"start_below: {start_below} with stop_above {stop_above} is not allowed; "
                "it must be above 0, and stop_above from there to 1"
            )
        self.margin = margin
        self.start_below = start_below
        self.stop_above = stop_above
        self._clock = clock
        self._is_balancing = False

    def decide(
        self,
        current: Placement,
        make_plan: Callable[[], Plan],
        demand: Mapping[str, Demand],
        layer_time: LayerTime,
        move_cost: MoveCost,
        rank_speed: npt.ArrayLike | None = None,
        is_new: bool = False,
    ) -> Decision:
        """Decide whether to move experts; `make_plan` is called only if no cheaper check is against moving.

        Args:
            current: where the experts are.
            make_plan: returns a plan that starts from `current`.
            demand: by phase.
            layer_time: fitted from measured steps.
            move_cost: of the plan's moves.
            rank_speed: [W], relative speed of each rank; None: all equal.
            is_new: the load has just begun or changed.
        """
        now = self._clock()
        rows_LE = np.zeros((current.num_layers, current.num_experts))
        for phase in demand.values():
            rows_LE += phase.rows * phase.num_steps
        if not rows_LE.any():
            return Decision(False, "no load", now, 1.0)
        before = balancedness(rank_loads(rows_LE, current.slots, rank_speed), rank_speed)
        self._is_balancing = before < (self.stop_above if self._is_balancing else self.start_below)
        if not self._is_balancing:
            return Decision(False, "balanced", now, before)
        if is_new:
            return Decision(False, "new load", now, before)
        plan = make_plan()
        num_bytes = len(plan.moves) * move_cost.bytes_per_move
        cost = move_cost.seconds(plan.moves)
        seconds, planned_seconds = (
            _horizon_seconds(demand, layer_time, placement, rank_speed) for placement in (current, plan.placement)
        )
        saving = seconds - planned_seconds
        reason = self._reason(plan, saving, cost)
        return Decision(
            moves_experts=reason == "pays back",
            reason=reason,
            at=now,
            balancedness=before,
            planned_balancedness=balancedness(rank_loads(rows_LE, plan.placement.slots, rank_speed), rank_speed),
            num_moves=len(plan.moves),
            num_bytes=num_bytes,
            cost_seconds=cost,
            saving_seconds=saving,
            margin=self.margin,
            horizon_steps=sum(phase.num_steps for phase in demand.values()),
            sparse_seconds=seconds,
            planned_sparse_seconds=planned_seconds,
            plan=plan,
        )

    def _reason(self, plan: Plan, saving: float, cost: float) -> Reason:
        """Why a plan is carried out or not."""
        if not plan.moves:
            return "nothing to move"
        if saving <= 0:
            return "slower"
        return "pays back" if saving > self.margin * cost else "does not pay back"


def _horizon_seconds(
    demand: Mapping[str, Demand], layer_time: LayerTime, placement: Placement, rank_speed: npt.ArrayLike | None
) -> float:
    """Time of all sparse layers in all steps within the horizon."""
    return sum(
        phase.num_steps * layer_time.step_seconds(phase.rows, placement, rank_speed) for phase in demand.values()
    )


def balancedness(load_LW: npt.NDArray[np.float64], rank_speed: npt.ArrayLike | None = None) -> float:
    """Mean rank load / max rank load. Layers run one after the other, so both are summed over all layers.

    Args:
        load_LW: from `split.rank_loads`.
        rank_speed: [W], loads are divided by it; None: all equal.
    """
    speed_W = np.ones(load_LW.shape[1]) if rank_speed is None else np.asarray(rank_speed, np.float64)
    most = float((load_LW / speed_W).max(axis=1).sum())
    return min(float(load_LW.sum() / speed_W.sum()) / most, 1.0) if most > 0 else 1.0
