"""The host of rank processes: starts them on their share of the cores, notes how they end, and leaves none running."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from moe_runtime.system.signals import END_SIGNALS
from moe_runtime.wire.transport import RankExited

logger = logging.getLogger(__name__)

RANK_COMMAND = (sys.executable, "-P", "-m", "moe_runtime.cluster.rank")
START_DEADLINE = 60.0
STOP_GRACE = 5.0
KILL_GRACE = 5.0


def divide_cores(cores: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Each rank's share of `cores`: contiguous shares, whose sizes differ by at most one.

    With fewer cores than ranks, each rank gets one core, and ranks share cores round robin.
    """
    assert cores and num_ranks >= 1
    if len(cores) < num_ranks:
        return [[cores[rank % len(cores)]] for rank in range(num_ranks)]
    bounds = [rank * len(cores) // num_ranks for rank in range(num_ranks + 1)]
    return [list(cores[low:high]) for low, high in itertools.pairwise(bounds)]


def describe_exit(exited: RankExited) -> str:
    """How a rank's process ended, in words."""
    who = f"rank {exited.rank} (pid {exited.pid})"
    if exited.returncode < 0:
        return f"{who} was killed by {signal.Signals(-exited.returncode).name}"
    return f"{who} ended with exit code {exited.returncode}"


@dataclass(frozen=True)
class FrontAddress:
    """The front's addresses for ranks: the control plane's ZeroMQ endpoint, and the rendezvous store's address."""

    control: str
    store_host: str


class Host:
    """Starts one process that forks into the processes of `ranks`, and watches these until they end.

    Args:
        shares: cores of each rank in `ranks`, as from `divide_cores`.
        local_ranks: number of ranks on this machine.
        command: starts the process that forks; the ranks' arguments are appended.

    Raises:
        ValueError: MOE_RUNTIME_NUM_THREADS is not a number of threads.
        OSError: the command can't be run, or there are too many open files.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        shares: Sequence[Sequence[int]],
        front: FrontAddress,
        *,
        local_ranks: int,
        generation: int = 0,
        command: Sequence[str] = RANK_COMMAND,
    ) -> None:
        self.exits: list[RankExited] = []  # in the order in which the processes ended
        self._ranks = tuple(ranks)
        self._pids: dict[int, int] = {}
        self._forked = threading.Event()
        arguments = ["--generation", generation, "--local-ranks", local_ranks]
        arguments += ["--control", front.control, "--store-host", front.store_host]
        for rank, cores in zip(ranks, shares, strict=True):
            arguments += ["--rank", f"{rank}:{_num_threads(len(cores))}:{','.join(map(str, cores))}"]
        started: Future[subprocess.Popen[bytes]] = Future()
        self._thread = threading.Thread(
            target=self._keep,
            args=([*command, *map(str, arguments)], _environment(front), started),
            name="host of ranks",
            daemon=True,
        )
        self._thread.start()
        self._process = started.result()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, once all have been started. A rank that could not be started has its parent's."""
        self._forked.wait(START_DEADLINE)
        return [self._pids.get(rank, self._process.pid) for rank in self._ranks]

    def stop(self, grace: float = STOP_GRACE) -> None:
        """Wait up to `grace` seconds for the processes to end, as the front has told them to. Then kill the rest."""
        self._thread.join(grace)
        if self._thread.is_alive() and self._forked.is_set():
            for rank in sorted(self._pids.keys() - {exited.rank for exited in self.exits}):
                if grace > 0:
                    logger.warning(
                        "rank %d (pid %d) did not end within %g s and is killed", rank, self._pids[rank], grace
                    )
                with suppress(ProcessLookupError):
                    os.kill(self._pids[rank], signal.SIGKILL)
            self._thread.join(KILL_GRACE)
        if self._thread.is_alive():
            self._process.kill()  # its ranks die with it
            self._thread.join(KILL_GRACE)

    def _keep(self, command: list[str], environment: dict[str, str], started: Future[subprocess.Popen[bytes]]) -> None:
        """Start the process that forks, and read its reports until all processes have ended.

        That process inherits this thread's signal mask, so a Ctrl-C cannot end it before it has set itself to ignore
        one. It asks to be killed when its parent ends. For Linux, the parent is the thread that started it: this
        thread, which lives as long as that process.
        """
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
            process, reports = _start(command, environment)
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(process)
        running = set(self._ranks)
        with os.fdopen(reports) as lines:  # ends when all processes that could write have ended
            for line in lines:
                number, pid, what = line.split()
                rank = int(number)
                if what == "started":
                    self._pids[rank] = int(pid)
                    if len(self._pids) == len(self._ranks):
                        self._forked.set()
                else:
                    self.exits.append(RankExited(rank, int(pid), int(what)))
                    running.remove(rank)
        process.wait()
        self._forked.set()
        assert process.stdin is not None
        process.stdin.close()
        for rank in sorted(running):  # they ended with the process, or never started
            self.exits.append(RankExited(rank, self._pids.get(rank, process.pid), process.returncode))


def _start(command: Sequence[str], environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start the process that forks. Returns it, and the end of the pipe from which its reports are read."""
    reports, write_end = os.pipe()
    command = [*command, "--reports", str(write_end)]
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=[write_end]), reports
    except OSError:
        os.close(reports)
        raise
    finally:
        os.close(write_end)


def _num_threads(num_cores: int) -> int:
    """Threads of a rank with `num_cores` cores."""
    threads = os.environ.get("MOE_RUNTIME_NUM_THREADS", str(num_cores))
    if not threads.isdecimal() or int(threads) < 1:
        raise ValueError(f"MOE_RUNTIME_NUM_THREADS: {threads!r} is not allowed; it must be an integer of at least 1")
    return int(threads)


def _environment(front: FrontAddress) -> dict[str, str]:
    """Environment of the process that forks. No library may start threads there. A rank sets its own thread count."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    if front.store_host == "127.0.0.1":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment
