"""Memory and CPU time of processes, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """Processes that this one has started, and their descendants."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, read(path).split()):
            found += [child, *descendants(child)]
    return found


def pss(pid: int) -> int:
    """Bytes of a process, with pages that several processes share divided among them; 0 if it has ended."""
    lines = read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, of all its threads; 0 if it has ended."""
    fields = read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND if fields else 0.0


def read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):  # the process has ended
        return ""
