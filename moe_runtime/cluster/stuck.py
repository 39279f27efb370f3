"""Of the ranks that do not answer, finds those that the others wait for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# States of a process, as /proc shows them, that a rank which waits for others does not have. The first one that is
# found explains the most.
DOES = {"T": "is stopped", "t": "is stopped by a debugger", "D": "waits for a device or a disk", "R": "still computes"}


def stuck_ranks(pids: Mapping[int, int]) -> dict[int, str]:
    """What the ranks do that the others wait for, by rank. Empty if it cannot be told.

    Args:
        pids: the processes of the ranks that do not answer, on this machine.
    """
    states = {rank: process_state(pid) for rank, pid in pids.items()}
    for state, does in DOES.items():
        if found := [rank for rank in states if states[rank] == state]:
            return dict.fromkeys(found, does)
    return {}


def process_state(pid: int) -> str:
    """The letter of a process's state, "" if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]
