"""Serving under torchrun or DeepSpeed's launcher. Each process that they start is the host of one rank. The first
process is also the front.

Only the front imports torch, for the rendezvous store.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

from moe_runtime.build import MakeExecutor
from moe_runtime.cluster.host import RANK_COMMAND, STOP_GRACE, FrontAddress, Host, describe_exit, divide_cores
from moe_runtime.cluster.process_executor import ProcessExecutor
from moe_runtime.cluster.rank_group import FOLDER_PREFIX, START_TIMEOUT, Site, socket_folder
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.server import ServerConfig
from moe_runtime.system.owned_folders import hold_folder, remove_abandoned, remove_own_folder
from moe_runtime.wire.transport import Alive, Dealer, Hello, Stop, host_name

logger = logging.getLogger(__name__)

POLL_INTERVAL = 0.1
ALIVE_INTERVAL = 1.0
FRONT_LOST = 3.0  # seconds without a connection after which a host considers the front dead
DRAIN_LIMIT = 27.0  # seconds; the front drains within 25 s of SIGTERM, and the launchers kill after 30 s


@dataclass(frozen=True)
class Torchrun:
    """The environment variables that torchrun or DeepSpeed's launcher sets for each of its processes."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    run_id: str

    @classmethod
    def from_environment(cls) -> Torchrun:
        env = os.environ
        torchrun = "TORCHELASTIC_RUN_ID" in env
        return cls(
            launcher="torchrun" if torchrun else "deepspeed",
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            local_world_size=int(env["LOCAL_WORLD_SIZE" if torchrun else "LOCAL_SIZE"]),
            master_addr=env["MASTER_ADDR"],
            master_port=int(env["MASTER_PORT"]),
            # DeepSpeed gives no run id, but one launcher is the parent of all its processes on a node.
            run_id=env["TORCHELASTIC_RUN_ID"] if torchrun else f"deepspeed {os.getppid()}",
        )

    @property
    def one_node(self) -> bool:
        return self.world_size == self.local_world_size


def under_torchrun() -> bool:
    """Whether torchrun or DeepSpeed's launcher started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "LOCAL_SIZE", "CROSS_SIZE"} <= os.environ.keys()


def serve_torchrun(config: EngineConfig, server_config: ServerConfig) -> int:
    """`serve` under torchrun: host one rank; rank 0 also serves HTTP. Returns the exit code.

    Raises:
        ValueError: `config.ep_size` is neither 1, its default, nor the number of torchrun's processes.
    """

    def run_front(config: EngineConfig, make_executor: MakeExecutor) -> int:
        from moe_runtime.build import build_engine
        from moe_runtime.serve.server import run_server

        local_ranks = Torchrun.from_environment().local_world_size
        return run_server(partial(build_engine, config, make_executor, local_ranks), server_config)

    return run_torchrun(config, run_front)


def run_torchrun(
    config: EngineConfig,
    run_front: Callable[[EngineConfig, MakeExecutor], int],
    command: Sequence[str] = RANK_COMMAND,
) -> int:
    """Run as one of torchrun's processes. Returns the exit code: 0 after a clean stop.

    Args:
        run_front: called on rank 0 with the configuration and a function that makes the executor. Runs the front until
            it stops, and returns its exit code.
        command: starts the process that forks into the ranks.
    """
    torchrun = Torchrun.from_environment()
    if config.ep_size not in (1, torchrun.world_size):
        raise ValueError(
            f"ep_size: {config.ep_size} is not allowed under {torchrun.launcher} with {torchrun.world_size} processes; "
            f"it must be {torchrun.world_size}, or left out"
        )
    config = replace(config, ep_size=torchrun.world_size)
    directory = _shared_directory(torchrun) if torchrun.one_node else None
    try:
        site = _site(torchrun, directory)
        if torchrun.rank == 0:
            return run_front(config, partial(ProcessExecutor, site=site, command=command))
        return _run_host(torchrun.rank, site, command)
    finally:
        if directory is not None:  # each process tries, so that nothing is left if one was killed
            remove_own_folder(directory)


def _site(torchrun: Torchrun, directory: Path | None) -> Site:
    if directory is not None:
        control = bind = f"ipc://{directory}/front"
        store_host = store_bind = "127.0.0.1"
    else:
        port = _control_port(torchrun)
        control, bind = f"tcp://{torchrun.master_addr}:{port}", f"tcp://*:{port}"
        store_host, store_bind = torchrun.master_addr, ""
    cores = divide_cores(sorted(os.sched_getaffinity(0)), torchrun.local_world_size)
    return Site(
        num_ranks=torchrun.world_size,
        own_ranks=(torchrun.rank,),
        shares=[cores[torchrun.local_rank]],
        remote_ranks=tuple(rank for rank in range(torchrun.world_size) if rank != torchrun.rank),
        local_ranks=torchrun.local_world_size,
        front=FrontAddress(control, store_host),
        bind=bind,
        store_bind=store_bind,
        directory=directory,
    )


def _control_port(torchrun: Torchrun) -> int:
    text = os.environ.get("MOE_RUNTIME_CONTROL_PORT", str(torchrun.master_port + 1))
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ValueError(f"MOE_RUNTIME_CONTROL_PORT: {text!r} is not allowed; it must be from 1 to 65535")
    return int(text)


def _shared_directory(torchrun: Torchrun) -> Path:
    """The private directory of this run. All of this user's processes of the run find it by its name."""
    run = hashlib.sha256(f"{torchrun.run_id} {torchrun.master_addr} {torchrun.master_port}".encode()).hexdigest()
    remove_abandoned(socket_folder(), FOLDER_PREFIX)
    path = socket_folder() / f"{FOLDER_PREFIX}{os.getuid()}-{run[:16]}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ValueError(f"{path}: is not allowed; it must be a directory that only this user can enter. Remove it")
    hold_folder(path)
    return path


class _HostSignals:
    """Notes the time of the first signal to end, and continues: the front drains first, then tells the host to end."""

    def __init__(self) -> None:
        self.told_at: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)

    def seconds_since(self, now: float) -> float | None:
        return None if self.told_at is None else now - self.told_at

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.told_at = self.told_at or time.monotonic()


def _run_host(rank: int, site: Site, command: Sequence[str]) -> int:
    signals = _HostSignals()
    front = Dealer(site.front.control, host_name(rank))
    try:
        host = Host(site.own_ranks, site.shares, site.front, local_ranks=site.local_ranks, command=command)
        try:
            front.send(Hello("host", rank, 0, os.getpid()))
            clean = _attend(front, host, signals)
            host.stop(STOP_GRACE if clean else 0.0)
        finally:
            host.stop(0.0)
    finally:
        front.close()
    return 0 if clean and not any(exited.returncode for exited in host.exits) else 1


def _attend(front: Dealer, host: Host, signals: _HostSignals) -> bool:
    """Report to the front that the host is alive, and when its rank ends, until `Stop`. Returns whether all is well."""
    started_at = time.monotonic()
    alive_at = 0.0
    num_reported = 0
    while True:
        message = front.receive(POLL_INTERVAL)
        if message is not None:
            assert isinstance(message, Stop)
            return not message.failed
        for exited in host.exits[num_reported:]:
            logger.error("%s", describe_exit(exited))
            front.send(exited)
            num_reported += 1
        now = time.monotonic()
        connected = front.connected
        if connected and now - alive_at >= ALIVE_INTERVAL:
            front.send(Alive())
            alive_at = now
        if reason := _lost_cause(front, now - started_at, signals.seconds_since(now)):
            logger.error("%s; ending", reason)
            return False


def _lost_cause(front: Dealer, seconds: float, seconds_told: float | None) -> str | None:
    """The reason to stop waiting for the front's `Stop`, or None."""
    if front.lost_seconds > FRONT_LOST:
        return "the front has gone"
    if not front.ever_connected:
        if seconds_told is not None:
            return "told to end, and the front has not started"
        if seconds > START_TIMEOUT:
            return f"the front has not started within {START_TIMEOUT:g} s"
    if seconds_told is not None and seconds_told > DRAIN_LIMIT:
        return f"told to end {DRAIN_LIMIT:g} s ago, and the front has not said stop"
    return None
