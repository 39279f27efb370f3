"""The conductor's side of the protocol: engine processes, of which one runs at a time while the others are stopped."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

SCRIPTS = Path(__file__).parents[1]
STOP_DEADLINE_S = 30.0
TAIL_LINES = 15


class DriverError(RuntimeError):
    """An engine ended or did not answer; the message says which and where its log is."""


class Driver:
    """An engine in a process group of its own. Between commands the group is stopped, so that it burns no CPU.

    Args:
        name: shown in tables.
        python: interpreter of the engine's environment.
        module, arguments: run as `python -m module arguments`.
        environment: variables beside the caller's own.
        log: file for the engine's output.
        deadline_s: for every answer, including the first, which comes when the engine is loaded.

    Raises:
        DriverError: the engine does not start.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        module: str,
        arguments: list[str],
        *,
        environment: dict[str, str],
        log: Path,
        deadline_s: float,
    ) -> None:
        self.name, self.log, self.deadline_s = name, log, deadline_s
        self._answers: queue.Queue[str] = queue.Queue()
        variables = os.environ | {"PYTHONPATH": str(SCRIPTS), "PYTHONSAFEPATH": "1"} | environment
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(python), "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=variables,
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def call(self, command: str, **arguments: Any) -> Any:
        """Let the engine run, wait for its answer, and stop it again.

        Raises:
            DriverError: it ended, or the deadline passed.
        """
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=self.deadline_s)
        except queue.Empty:
            raise DriverError(f"{self.name}: no answer to {command!r} in {self.deadline_s:.0f} s; {self.log}") from None
        except BrokenPipeError:
            answer = ""
        if not answer:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
            raise DriverError(f"{self.name}: ended during {command!r}; the end of {self.log}:\n{tail}")
        self._signal(signal.SIGSTOP)
        return json.loads(answer)

    def close(self) -> None:
        """End the process group: by closing stdin, then by SIGKILL."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it has already ended
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_DEADLINE_S)
        self._signal(signal.SIGKILL)  # whatever is left of the group
        self._process.wait()
        self._listener.join()

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                self._answers.put(line)
        self._answers.put("")

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # the whole group has ended
            os.killpg(self._process.pid, number)
