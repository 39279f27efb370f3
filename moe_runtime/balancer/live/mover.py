"""Carries out changes of the placement: one migration at a time, with a budget of bytes between steps. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.balancer.live.migration import Migration
from moe_runtime.balancer.placement import Placement
from moe_runtime.wire.executor import Executor
from moe_runtime.wire.messages import SlotReport

FIRST_COPY_RATE = 5e8  # bytes per second, until a copy has been measured
COPY_SHARE, LEAST_COPY = 0.15, 256 << 10  # share of a step's time; bytes that are always allowed
IDLE_COPY = 64 << 20
REPORT_TIMEOUT = 120.0


@dataclass
class Rebalance:
    """A change of the placement that a user requested, or that the balancer decided on.

    `moves` and the fields after it are filled in when it is `done`. With `dry_run` it is done at once, without moves.
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

    def __str__(self) -> str:
        """The figures in words, for the log."""
        after = "" if self.balancedness_after is None else f", is now {self.balancedness_after:.3f}"
        return (
            f"{len(self.moves or ())} of {self.planned_moves} planned moves in {self.seconds:.2f} s, "
            f"{self.copied_bytes / 1e6:.1f} MB copied, {len(self.rollbacks or ())} rollbacks; balancedness was "
            f"{self.balancedness_before:.3f}{after}, planned {self.balancedness_planned:.3f}; "
            f"placement version {self.placement_version}"
        )


class Mover:
    """Moves experts between slots.

    Args:
        executor: runs the engine's ranks.
        num_slots: slots of each rank in a layer. One slot stays empty except during a move.
        expert_bytes: bytes of one expert's weights.
        bytes_per_step: bytes that a rank may copy between two steps; None: a share of a step's time.

    Attributes:
        moves, copied_bytes, rollbacks: since the start.
        copy_rate: bytes per second, from the last measurement.
    """

    def __init__(
        self, executor: Executor, num_slots: Sequence[int], expert_bytes: int, bytes_per_step: int | None
    ) -> None:
        self.moves = self.copied_bytes = self.rollbacks = 0
        self.copy_rate = FIRST_COPY_RATE
        self._executor = executor
        self._num_slots = num_slots
        self._expert_bytes = expert_bytes
        self._bytes_per_step = bytes_per_step
        self._budget = 0
        self._migration: Migration | None = None
        self._rebalance: Rebalance | None = None
        self._next_task = 0

    @property
    def is_moving(self) -> bool:
        return self._migration is not None

    def start(self, placement: Placement, target: Placement, rebalance: Rebalance) -> None:
        """Start moving experts from one placement to another; `rebalance` is filled in when the migration ends."""
        assert self._migration is None
        self._rebalance = rebalance
        self._migration = Migration(
            placement,
            target,
            self._executor.send_task,
            num_slots=self._num_slots,
            expert_bytes=self._expert_bytes,
            budget=lambda: self._budget,
            timeout=REPORT_TIMEOUT,
            first_task=self._next_task,
        )

    def take(self, report: SlotReport) -> None:
        """Take a rank's report; without a running migration, ignore it."""
        if self._migration is not None:
            self._migration.take(report)

    def tick(self, step_seconds: float, idle: bool) -> Placement | None:
        """Continue, once between two steps. Returns the placement if it has changed.

        Args:
            step_seconds: recent mean duration of a step.
            idle: no request waits for a step.
        """
        assert self._migration is not None
        if idle:
            self._budget = IDLE_COPY
        elif self._bytes_per_step is not None:
            self._budget = self._bytes_per_step
        else:
            self._budget = max(LEAST_COPY, int(COPY_SHARE * step_seconds * self.copy_rate))
        return self._migration.placement if self._migration.tick() else None

    def take_finished(self) -> Rebalance | None:
        """Once after a migration has ended, its result, without the balancedness after it; else None."""
        if self._migration is None or not self._migration.done:
            return None
        assert self._rebalance is not None
        report, rebalance = self._migration.report, self._rebalance
        rebalance.placement_version = self._migration.placement.version
        self._next_task = self._migration.next_task
        self._migration = self._rebalance = None
        self.moves += len(report.moves)
        self.copied_bytes += report.copied_bytes
        self.rollbacks += len(report.failures)
        if report.copied_bytes and report.copy_seconds > 0:
            self.copy_rate = report.copied_bytes / report.copy_seconds
        rebalance.moves = [vars(move) for move in report.moves]
        rebalance.copied_bytes = report.copied_bytes
        rebalance.rollbacks = report.failures
        rebalance.seconds = report.seconds or 0.0
        rebalance.done = True
        return rebalance
