"""Moves experts to other slots while the engine serves: copy, check, commit, layer by layer in rounds. No torch.

Every rank keeps a slot free in each layer, the shadow. In a round, ranks copy one expert each into it, between steps,
so many bytes at a time; then they and a rank that has held the expert so far sum up what their slots hold. Only if
the sums agree is the round committed: the front raises the version of the placement, and the next plan has new routes,
so all ranks switch at once. The slot that an expert gave up is the new shadow. Until the commit nothing has changed for
the tokens, so what fails is dropped and serving goes on; the old expert still lies in its slot.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_runtime.balancer.placement import EMPTY, Placement
from moe_runtime.balancer.plan import Move
from moe_runtime.messages import SlotReport, SlotTask
from moe_runtime.migration_rounds import next_round

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # rounds that may fail before the rest of a migration is given up


@dataclass
class _Transfer:
    """An expert on its way into a rank's empty slot; the slot of `leaving` (EMPTY: none) becomes empty by it."""

    rank: int
    slot: int
    expert: int
    leaving: int
    task: SlotTask
    witness: tuple[int, SlotTask]  # rank and task that sum up the expert where it is now
    checksum: int | None = None
    expected: int | None = None


@dataclass
class MigrationReport:
    """What became of a migration.

    Attributes:
        moves: experts that have moved, each once its round was committed.
        copied_bytes: of weights read, also of moves that failed.
        copy_seconds: that ranks spent on copying and summing up.
        failures: why rounds were rolled back, one line each.
        dropped_moves: moves that were asked for and not made.
        seconds: from start to end; None until then.
    """

    moves: list[Move] = field(default_factory=list)
    copied_bytes: int = 0
    copy_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    dropped_moves: int = 0
    seconds: float | None = None


class Migration:
    """From one placement to another, both on the same ranks.

    Args:
        placement: where the experts are, with an empty slot on every rank in each layer.
        target: where they shall be; which of a rank's slots an expert takes does not matter.
        send: gives a rank a task; its report comes through `take`.
        bytes_per_step: that a rank may copy between two steps.
        timeout: seconds that a round may take.
        clock: seconds, monotonic.

    Attributes:
        placement: where the experts are now. `version` grows with every commit.
        report: how it went.
    """

    def __init__(
        self,
        placement: Placement,
        target: Placement,
        send: Callable[[int, SlotTask], None],
        *,
        bytes_per_step: int,
        timeout: float,
        first_task: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.placement = placement
        self.report = MigrationReport()
        self.next_task = first_task
        self._send = send
        self._bytes_per_step = bytes_per_step
        self._timeout = timeout
        self._clock = clock
        self._started = clock()
        self._wanted = target.hosts
        self._layers = list(np.nonzero((target.hosts != placement.hosts).any(axis=(1, 2)))[0])
        self._transfers: list[_Transfer] = []
        self._waiting: set[tuple[int, int]] = set()  # (rank, task) whose report has not come
        self._deadline = 0.0
        if not self._layers:
            self._finish()

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.report.seconds is not None

    def tick(self) -> bool:
        """Get on, once between two steps; True if this committed a change of `placement`."""
        if self.done:
            return False
        if not self._transfers:
            return self._begin_round()
        if self._clock() > self._deadline:
            ranks = ", ".join(f"rank {rank}" for rank in sorted({rank for rank, _ in self._waiting}))
            self._fail(f"no end within {self._timeout:g} s; waiting for {ranks or 'copies'}")
            return False
        self._send_next()
        if all(transfer.checksum is not None and transfer.expected is not None for transfer in self._transfers):
            return self._end_round()
        return False

    def take(self, report: SlotReport) -> None:
        """A rank's report; those of rounds that have failed are ignored."""
        key = (report.rank, report.task_id)
        if key not in self._waiting:
            return
        self._waiting.discard(key)
        self.report.copied_bytes += report.copied_bytes
        self.report.copy_seconds += report.seconds
        for transfer in self._transfers:
            if key == (transfer.rank, transfer.task.task_id) and report.done:
                transfer.checksum = report.checksum
            elif key == (transfer.witness[0], transfer.witness[1].task_id):
                transfer.expected = report.checksum
        if report.error:
            self._fail(f"rank {report.rank}: {report.error}")

    def _begin_round(self) -> bool:
        """Start the next round; True if it consists of experts that only go, which is a commit by itself."""
        while self._layers:
            layer = int(self._layers[0])
            slots_WS = self.placement.slots[layer]
            changes = next_round(slots_WS, self._wanted[layer])
            if changes is None:
                missing = int((self._wanted[layer] & ~self.placement.hosts[layer]).sum())
                if missing:
                    self.report.failures.append(
                        f"layer {layer}: {missing} moves have no order in which they can be made"
                    )
                self._drop_layer()
                continue
            self._transfers = [self._transfer(layer, *change) for change in changes if change[1] != EMPTY]
            self._deadline = self._clock() + self._timeout
            if self._transfers:
                self._send_next()
                return False
            self._commit(
                [(layer, rank, int(np.nonzero(slots_WS[rank] == gone)[0][0]), EMPTY) for rank, _, gone in changes]
            )
            return True
        self._finish()
        return False

    def _transfer(self, layer: int, rank: int, expert: int, leaving: int) -> _Transfer:
        slots_WS = self.placement.slots[layer]
        slot = int(np.nonzero(slots_WS[rank] == EMPTY)[0][0])
        holder, held = (int(index) for index in np.argwhere(slots_WS == expert)[0])
        task = SlotTask(self.next_task, layer, slot, expert, self._bytes_per_step)
        witness = SlotTask(self.next_task + 1, layer, held, EMPTY, self._bytes_per_step)
        self.next_task += 2
        return _Transfer(rank, slot, expert, leaving, task, (holder, witness))

    def _send_next(self) -> None:
        """Give every rank that waits for nothing its next piece of work: first copies, then sums."""
        busy = {rank for rank, _ in self._waiting}
        for transfer in self._transfers:
            if transfer.checksum is None and transfer.rank not in busy:
                self._ask(transfer.rank, transfer.task)
                busy.add(transfer.rank)
            rank, task = transfer.witness
            if transfer.checksum is not None and transfer.expected is None and rank not in busy:
                self._ask(rank, task)
                busy.add(rank)

    def _ask(self, rank: int, task: SlotTask) -> None:
        self._waiting.add((rank, task.task_id))
        self._send(rank, task)

    def _end_round(self) -> bool:
        for transfer in self._transfers:
            if transfer.checksum != transfer.expected:
                self._fail(
                    f"layer {transfer.task.layer}, expert {transfer.expert}: the copy on rank {transfer.rank} differs "
                    f"from the weights on rank {transfer.witness[0]}"
                )
                return False
        layer = self._transfers[0].task.layer
        slots_WS = self.placement.slots[layer]
        changes = []
        for transfer in self._transfers:
            changes.append((layer, transfer.rank, transfer.slot, transfer.expert))
            if transfer.leaving != EMPTY:
                freed = int(np.nonzero(slots_WS[transfer.rank] == transfer.leaving)[0][0])
                changes.append((layer, transfer.rank, freed, EMPTY))
            self.report.moves.append(Move(layer, transfer.rank, transfer.slot, transfer.expert))
        self._transfers = []
        self._commit(changes)
        return True

    def _commit(self, changes: Sequence[tuple[int, int, int, int]]) -> None:
        slots = self.placement.slots.copy()
        for layer, rank, slot, expert in changes:
            slots[layer, rank, slot] = expert
        before = self.placement
        self.placement = Placement(slots, before.num_experts, before.layer_ids, before.version + 1)

    def _fail(self, why: str) -> None:
        """Roll the round back: nothing was committed, so it is enough to forget it."""
        logger.warning("a migration was rolled back: %s", why)
        self.report.failures.append(why)
        self._transfers = []
        self._waiting.clear()
        if len(self.report.failures) >= MAX_FAILURES:
            while self._layers:
                self._drop_layer()
            self._finish()

    def _drop_layer(self) -> None:
        layer = self._layers.pop(0)
        self.report.dropped_moves += int((self._wanted[layer] & ~self.placement.hosts[layer]).sum())

    def _finish(self) -> None:
        self.report.seconds = self._clock() - self._started
