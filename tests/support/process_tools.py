"""Waits for processes and finds those left running, for tests that start processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path


def eventually(condition: Callable[[], object], seconds: float) -> bool:
    """Whether `condition` comes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def running(pid: int) -> bool:
    """Whether a process runs; a zombie (ended, not yet reaped) does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


class Script:
    """A process in a session of its own, with its output in a file, and all processes that it starts."""

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
        self.mark = f"MOE_RUNTIME_TEST_MARK={uuid.uuid4()}"
        self._output = folder / f"{uuid.uuid4()}.txt"
        name, _, value = self.mark.partition("=")
        path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONPATH": os.pathsep.join(path),
                    name: value,
                    **(environment or {}),
                },
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def values(self, name: str) -> list[int]:
        """Numbers in the output's lines `name: number number ...`."""
        lines = [line.partition(":")[2] for line in self.output.splitlines() if line.startswith(f"{name}:")]
        return [int(value) for line in lines for value in line.split()]

    def wait_for(self, text: str, seconds: float = 60) -> None:
        assert eventually(lambda: text in self.output or self.process.poll() is not None, seconds), self.output
        assert text in self.output, self.output

    def wait(self, seconds: float) -> int:
        """The exit code; fails if the process does not end within `seconds`."""
        assert eventually(lambda: self.process.poll() is not None, seconds), f"still running\n{self.output}"
        return self.process.wait()

    def left(self) -> list[int]:
        """Processes started by this script that still run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.mark.encode() in (folder / "environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if marked and running(int(folder.name)):
                found.append(int(folder.name))
        return found

    def close(self) -> None:
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
