"""A rank's side of a migration: experts are copied into slots piece by piece, between steps."""

from __future__ import annotations

import time
from collections.abc import Iterator

from moe_runtime.experts.parts import checksum
from moe_runtime.layers.kit import Experts
from moe_runtime.models.reader import ModelReader
from moe_runtime.wire.messages import SlotReport, SlotTask

PIECE_BYTES = 256 << 10  # of an expert: a copy can stop for the next step after each piece


class SlotTasks:
    """Runs the tasks of one rank.

    Args:
        rank: this rank.
        reader: reads experts' weights.
        experts: the slots of each sparse layer.
    """

    def __init__(self, rank: int, reader: ModelReader, experts: list[Experts]) -> None:
        self._rank = rank
        self._reader = reader
        self._experts = experts
        self._copies: dict[int, Iterator[int]] = {}  # by task

    def run(self, task: SlotTask) -> SlotReport:
        """Continue a task; see `SlotTask`. Errors are in the report."""
        start, copied, error, done, total = time.perf_counter(), 0, "", False, 0
        experts = self._experts[task.layer]
        try:
            copied, done = self.copy(experts, task)
            if done:
                total = checksum(experts.stored(task.slot))
        except (OSError, ValueError) as problem:
            self._copies.pop(task.task_id, None)
            error, done = str(problem), True
        return SlotReport(self._rank, task.task_id, done, copied, time.perf_counter() - start, total, error)

    def copy(self, experts: Experts, task: SlotTask) -> tuple[int, bool]:
        """Copy up to the task's `max_bytes`; returns the copied bytes, and whether the copy is complete."""
        if task.expert < 0:
            return 0, True
        if task.task_id not in self._copies:
            piece = min(task.max_bytes, PIECE_BYTES)
            self._copies[task.task_id] = self._reader.copy_expert(experts, task.slot, task.layer, task.expert, piece)
        copied = 0
        for nbytes in self._copies[task.task_id]:
            copied += nbytes
            if copied >= task.max_bytes:
                return copied, False
        del self._copies[task.task_id]
        return copied, True
