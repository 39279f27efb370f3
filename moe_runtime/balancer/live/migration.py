"""Moves experts to other slots while the engine serves: copy, check, commit, in migration rounds. No torch.

Every rank keeps one slot free in each layer, the shadow slot. In a layer's migration round, each rank copies one
expert into it, between steps, a limited number of bytes at a time. Then this rank and a rank that already held the
expert compute checksums of their slots. The front commits the round only if the checksums agree. It raises the version
of the placement, and the next plan has new replica tables, so all ranks switch at once. The slot that an expert left is
the new shadow slot. Until the commit nothing changes for the tokens, and the old expert stays in its slot. So a failed
round is dropped, and serving continues.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.live.migration_rounds import next_round
from moe_runtime.balancer.placement import EMPTY, Placement
from moe_runtime.balancer.plan import Move
from moe_runtime.wire.messages import SlotReport, SlotTask

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # the rest of a migration is given up when this many rounds have failed


@dataclass
class _Transfer:
    """An expert that moves into a rank's empty slot; the commit empties the slot of `leaving` (EMPTY: none)."""

    rank: int
    slot: int
    expert: int
    leaving: int
    task: SlotTask
    witness: tuple[int, SlotTask]  # rank that holds the expert now, and task that computes its checksum there
    checksum: int | None = None
    expected: int | None = None


@dataclass
class _LayerRound:
    """A layer's transfers that will be committed together; `deadline` is that of the missing reports."""

    layer: int
    transfers: list[_Transfer]
    deadline: float = math.inf

    @property
    def keys(self) -> set[tuple[int, int]]:
        """(rank, task) of all tasks."""
        copies = {(transfer.rank, transfer.task.task_id) for transfer in self.transfers}
        return copies | {(transfer.witness[0], transfer.witness[1].task_id) for transfer in self.transfers}

    @property
    def is_complete(self) -> bool:
        return all(transfer.checksum is not None and transfer.expected is not None for transfer in self.transfers)


@dataclass
class MigrationReport:
    """The result of a migration.

    Attributes:
        moves: experts that have moved; a move is added when its round is committed.
        copied_bytes: bytes of weights read, including those of failed moves.
        copy_seconds: time that ranks spent on copying and checksums.
        failures: why rounds were rolled back, one line each.
        dropped_moves: number of requested moves that were not made.
        seconds: from start to end; None until the end.
    """

    moves: list[Move] = field(default_factory=list)
    copied_bytes: int = 0
    copy_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    dropped_moves: int = 0
    seconds: float | None = None


class Migration:
    """From one placement to another, both on the same ranks; all layers at the same time.

    Args:
        placement: where the experts are.
        target: where they must be in the end. Which of a rank's slots an expert takes does not matter.
        send: gives a rank a task; its report comes through `take`.
        num_slots: slots of each rank. In each layer a rank holds at most one expert fewer, both now and in `target`.
        expert_bytes: bytes of one expert's weights.
        budget: returns the bytes that a rank may now copy or check between two steps.
        timeout: seconds within which a rank must report.
        first_task: number of the first task.
        clock: seconds, monotonic.

    Attributes:
        placement: where the experts are now. `version` grows with every commit.
        report: the result so far.
        next_task: number of the first task of a later migration.
    """

    def __init__(
        self,
        placement: Placement,
        target: Placement,
        send: Callable[[int, SlotTask], None],
        *,
        num_slots: Sequence[int],
        expert_bytes: int,
        budget: Callable[[], int],
        timeout: float,
        first_task: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.placement = placement
        self.report = MigrationReport()
        self.next_task = first_task
        self._send = send
        self._num_slots = num_slots
        self._expert_bytes = expert_bytes
        self._budget = budget
        self._timeout = timeout
        self._clock = clock
        self._started = clock()
        self._wanted = target.hosts
        changes = (target.hosts != placement.hosts).any(axis=(1, 2))
        self._layers: list[int] = np.nonzero(changes)[0].tolist()
        self._rounds: dict[int, _LayerRound] = {}  # by layer
        self._waiting: set[tuple[int, int]] = set()  # (rank, task) whose report has not come
        self._finish_if_done()

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.report.seconds is not None

    def tick(self) -> bool:
        """Continue, once between two steps. True if a change of `placement` was committed, which the next plan carries.

        A task may overwrite a slot as soon as a commit frees it: ranks run the task after the steps they already
        have, and all later steps have the new replica tables.
        """
        before = self.placement
        for complete in [going for going in self._rounds.values() if going.is_complete]:
            if complete.layer in self._rounds:  # still there: another round's failure may have ended the migration
                self._end_round(complete)
        for layer in list(self._layers):
            if layer not in self._rounds:
                self._begin_round(layer)
        for late in [going for going in self._rounds.values() if self._clock() > going.deadline]:
            if late.layer not in self._rounds:  # another round's failure has ended the migration
                break
            ranks = ", ".join(f"rank {rank}" for rank in sorted({rank for rank, _ in late.keys & self._waiting}))
            self._fail(late, f"layer {late.layer}: no report within {self._timeout:g} s from {ranks}")
        self._send_next()
        self._finish_if_done()
        return self.placement is not before

    def take(self, report: SlotReport) -> None:
        """Take a rank's report; ignore reports of failed rounds."""
        key = (report.rank, report.task_id)
        if key not in self._waiting:
            return
        self._waiting.discard(key)
        self.report.copied_bytes += report.copied_bytes
        self.report.copy_seconds += report.seconds
        going = next(going for going in self._rounds.values() if key in going.keys)
        going.deadline = self._clock() + self._timeout if going.keys & self._waiting else math.inf
        if report.error:
            self._fail(going, f"rank {report.rank}: {report.error}")
            return
        for transfer in going.transfers:
            if key == (transfer.rank, transfer.task.task_id) and report.done:
                transfer.checksum = report.checksum
            elif key == (transfer.witness[0], transfer.witness[1].task_id):
                transfer.expected = report.checksum

    def _begin_round(self, layer: int) -> None:
        """Start a layer's next round. If experts only leave, commit at once."""
        slots_WS = self.placement.slots[layer]
        changes = next_round(slots_WS, self._wanted[layer], self._num_slots)
        if changes is None:
            if missing := self._missing(layer):
                self.report.failures.append(f"layer {layer}: there is no possible order for {missing} moves")
            self._drop_layer(layer)
            return
        transfers = [self._transfer(layer, *change) for change in changes if change[1] != EMPTY]
        if transfers:
            self._rounds[layer] = _LayerRound(layer, transfers)
        else:
            self._commit([(layer, rank, _slot_of(slots_WS[rank], gone), EMPTY) for rank, _, gone in changes])

    def _transfer(self, layer: int, rank: int, expert: int, leaving: int) -> _Transfer:
        slots_WS = self.placement.slots[layer]
        slot = _slot_of(slots_WS[rank, : self._num_slots[rank]], EMPTY)
        holder, held = (int(index) for index in np.argwhere(slots_WS == expert)[0])
        task = SlotTask(self.next_task, layer, slot, expert, self._expert_bytes)
        witness = SlotTask(self.next_task + 1, layer, held, EMPTY, 0)
        self.next_task += 2
        return _Transfer(rank, slot, expert, leaving, task, (holder, witness))

    def _send_next(self) -> None:
        """Give every rank without an open task as much work as its budget allows, copies first."""
        busy = {rank for rank, _ in self._waiting}
        left = [0 if rank in busy else max(1, self._budget()) for rank in range(self.placement.num_ranks)]
        transfers = [(going, transfer) for going in self._rounds.values() for transfer in going.transfers]
        for going, transfer in transfers:
            if transfer.checksum is None and left[transfer.rank] > 0:
                nbytes = min(left[transfer.rank], self._expert_bytes)
                self._ask(going, transfer.rank, replace(transfer.task, max_bytes=nbytes))
                left[transfer.rank] -= nbytes
        for going, transfer in transfers:
            rank, task = transfer.witness
            if transfer.expected is None and (rank, task.task_id) not in self._waiting and left[rank] > 0:
                self._ask(going, rank, task)
                left[rank] -= self._expert_bytes

    def _ask(self, going: _LayerRound, rank: int, task: SlotTask) -> None:
        self._waiting.add((rank, task.task_id))
        going.deadline = self._clock() + self._timeout
        self._send(rank, task)

    def _end_round(self, going: _LayerRound) -> None:
        for transfer in going.transfers:
            if transfer.checksum != transfer.expected:
                self._fail(
                    going,
                    f"layer {going.layer}, expert {transfer.expert}: the copy on rank {transfer.rank} differs from the "
                    f"weights on rank {transfer.witness[0]}",
                )
                return
        slots_WS = self.placement.slots[going.layer]
        changes = []
        for transfer in going.transfers:
            changes.append((going.layer, transfer.rank, transfer.slot, transfer.expert))
            if transfer.leaving != EMPTY:
                freed = _slot_of(slots_WS[transfer.rank], transfer.leaving)
                changes.append((going.layer, transfer.rank, freed, EMPTY))
            self.report.moves.append(Move(going.layer, transfer.rank, transfer.slot, transfer.expert))
        del self._rounds[going.layer]
        self._commit(changes)

    def _commit(self, changes: Sequence[tuple[int, int, int, int]]) -> None:
        slots = self.placement.slots.copy()
        for layer, rank, slot, expert in changes:
            slots[layer, rank, slot] = expert
        before = self.placement
        self.placement = Placement(slots, before.num_experts, before.layer_ids, before.version + 1)

    def _fail(self, going: _LayerRound, why: str) -> None:
        """Roll a round back. Nothing was committed, so it is enough to delete it; a later round tries again."""
        logger.warning("a migration was rolled back: %s", why)
        self.report.failures.append(why)
        self._waiting -= going.keys
        del self._rounds[going.layer]
        if len(self.report.failures) >= MAX_FAILURES:
            self._rounds.clear()
            self._waiting.clear()
            for layer in list(self._layers):
                self._drop_layer(layer)

    def _drop_layer(self, layer: int) -> None:
        self._layers.remove(layer)
        self.report.dropped_moves += self._missing(layer)

    def _missing(self, layer: int) -> int:
        return int((self._wanted[layer] & ~self.placement.hosts[layer]).sum())

    def _finish_if_done(self) -> None:
        if not self._layers and not self.done:
            self.report.seconds = self._clock() - self._started


def _slot_of(row_S: npt.NDArray[np.integer], expert: int) -> int:
    """The first slot of a rank that holds an expert, or is EMPTY."""
    return int(np.nonzero(row_S == expert)[0][0])
