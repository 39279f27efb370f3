"""Faults for the ranks of a pool; a module, since ranks import it by name."""

from __future__ import annotations

from rank_pool import RankContext

from moe_runtime.layers.kit import Experts
from moe_runtime.wire.messages import SlotTask


def break_copies(context: RankContext, fault: str | None) -> None:
    """From now on copies fail ("error"), or copied weights are damaged ("corrupt"); None removes the fault."""
    tasks = context.kept["worker"].slot_tasks
    if fault is None:
        tasks.__dict__.pop("copy", None)
        return
    whole = type(tasks).copy

    def broken(experts: Experts, task: SlotTask) -> tuple[int, bool]:
        if task.expert < 0:
            return whole(tasks, experts, task)
        if fault == "error":
            raise OSError("the file is gone")
        copied, done = whole(tasks, experts, task)
        if done:
            experts.stored(task.slot)[0].view(-1)[0] += 1
        return copied, done

    tasks.copy = broken
