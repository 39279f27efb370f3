"""The host of rank processes: starts them on their share of the cores, sees how they end, and leaves none behind."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from moe_runtime.transport import RankExited

logger = logging.getLogger(__name__)

RANK_COMMAND = (sys.executable, "-P", "-m", "moe_runtime.worker")
STOP_GRACE = 5.0
KILL_GRACE = 5.0


def divide_cores(cores: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Each rank's share of `cores`: contiguous, and of sizes that differ by at most one.

    With fewer cores than ranks, each rank gets one core and ranks share, round robin.
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
    """Where ranks find the front: ZeroMQ endpoint of the control plane, and address of the rendezvous store."""

    control: str
    store_host: str


class Host:
    """Starts one process per rank of `ranks` and keeps it until it ends.

    Args:
        shares: cores of each rank in `ranks`, as from `divide_cores`.
        local_ranks: number of ranks on this machine.
        command: starts a rank's process; the rank's arguments are appended.

    Raises:
        ValueError: MOE_RUNTIME_NUM_THREADS is not a number of threads.
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
        self._processes: list[_RankProcess] = []
        environments = [_environment(len(cores), front) for cores in shares]
        try:
            for rank, cores, environment in zip(ranks, shares, environments, strict=True):
                arguments = ["--rank", rank, "--generation", generation, "--local-ranks", local_ranks]
                arguments += ["--control", front.control, "--store-host", front.store_host]
                process = _RankProcess(rank, [*command, *map(str, arguments)], cores, environment, self.exits)
                self._processes.append(process)
        except OSError:
            self.stop(grace=0.0)
            raise

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def stop(self, grace: float = STOP_GRACE) -> None:
        """Wait up to `grace` seconds for the processes to end, which the front has asked for, then kill the rest."""
        deadline = time.monotonic() + grace
        for process in self._processes:
            process.wait(deadline)
        for process in self._processes:
            if process.running and grace > 0:
                logger.warning("%s did not end within %g s and is killed", process.name, grace)
            process.kill()
        deadline = time.monotonic() + KILL_GRACE
        for process in self._processes:
            process.wait(deadline)


class _RankProcess:
    """A process, and the thread that starts it and waits for its end.

    The process inherits the thread's cores and signal mask: it is pinned from its first instruction, and a Ctrl-C
    cannot hit it before it has said that it ignores one. It asks to be killed when its parent goes, which Linux takes
    to be the parent's thread; this one lives as long as the process.
    """

    def __init__(
        self, rank: int, command: list[str], cores: Sequence[int], environment: dict[str, str], exits: list[RankExited]
    ) -> None:
        started: Future[subprocess.Popen[bytes]] = Future()

        def run() -> None:
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
                os.sched_setaffinity(0, cores)
                process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
            except OSError as error:
                started.set_exception(error)
                return
            started.set_result(process)
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
            exits.append(RankExited(rank, process.pid, process.returncode))

        self._thread = threading.Thread(target=run, name=f"host of rank {rank}", daemon=True)
        self._thread.start()
        self._process = started.result()
        self.pid = self._process.pid
        self.name = f"rank {rank} (pid {self.pid})"

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, deadline: float) -> None:
        """Wait for the end until `deadline`, a time of `time.monotonic`."""
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        self._process.kill()


def _environment(num_cores: int, front: FrontAddress) -> dict[str, str]:
    threads = os.environ.get("MOE_RUNTIME_NUM_THREADS", str(num_cores))
    if not threads.isdecimal() or int(threads) < 1:
        raise ValueError(f"MOE_RUNTIME_NUM_THREADS: {threads!r} is not allowed; it must be an integer of at least 1")
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if front.store_host == "127.0.0.1":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment
