"""A server in processes of its own, as `moe-runtime serve` starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from served.processes import descendants

START_SECONDS = 300.0
STOP_SECONDS = 40.0
REPLY_SECONDS = 60.0


class Server:
    """A running server. `with Server(...) as server` waits until it is ready, and leaves no process.

    Args:
        model: as for `moe-runtime serve`.
        flags: its flags. The port is free one of this machine.
        env: further environment variables.
        wrapper: a command that runs the server's command, such as `("unshare", "-m", ...)`.
        waits: wait until the server is ready; otherwise `wait_ready` or `wait` must be called.

    Attributes:
        url: its address, once it is ready.
        log: what it has written to stderr, with its ranks.
    """

    def __init__(
        self,
        model: str,
        *flags: str,
        env: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        waits: bool = True,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._stdout, self._stderr = (Path(self._folder.name) / name for name in ("stdout", "stderr"))
        command = [*wrapper, sys.executable, "-P", "-m", "moe_runtime", "serve", model, "--port", "0", *flags]
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env={**os.environ, **(env or {})})
        self.url = ""
        self._waits = waits

    def __enter__(self) -> Server:
        if self._waits:
            self.wait_ready()
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in [*descendants(self.process.pid), self.process.pid] if self.process.poll() is None else []:
            os.kill(pid, signal.SIGCONT)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._folder.cleanup()

    def wait_ready(self) -> None:
        """Raises RuntimeError with the server's last lines if it ends, or is not ready in time."""
        deadline = time.monotonic() + START_SECONDS
        while not self.url:
            line = self._stdout.read_text()
            if line.endswith("\n"):
                self.url = line.split()[1]
            elif self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server is not ready: {self.log[-2000:]}")
            else:
                time.sleep(0.02)

    @property
    def log(self) -> str:
        return self._stderr.read_text()

    @property
    def front(self) -> int:
        """Process id of the front."""
        pid: int = self.health()["pid"]
        return pid

    @property
    def ranks(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        return [rank["pid"] for rank in self.health()["ranks"]]

    def get(self, path: str, seconds: float = REPLY_SECONDS) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=seconds) as reply:
            content: bytes = reply.read()
            return content

    def health(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.get("/health"))
        return content

    def metrics(self) -> dict[str, float]:
        """The value of each sample of `/metrics`; labels are part of its name, without the model's."""
        found = {}
        for line in self.get("/metrics").decode().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found

    def metrics_of(self, name: str) -> float:
        """The sum of a metric's samples."""
        return sum(value for key, value in self.metrics().items() if key.startswith(f"moe_runtime_{name}{{"))

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        """SIGTERM. Returns the exit code. Raises TimeoutExpired if the server does not end in time."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The exit code, once the server has ended."""
        return self.process.wait(seconds)
