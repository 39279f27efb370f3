"""The front's control of its ranks: starts them, carries messages, finds the rank that failed first, and ends all."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moe_runtime.cluster.host import RANK_COMMAND, STOP_GRACE, FrontAddress, Host, describe_exit, divide_cores
from moe_runtime.cluster.stuck import stuck_ranks
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.system.owned_folders import make_own_folder, remove_abandoned, remove_own_folder
from moe_runtime.types.version import __version__
from moe_runtime.wire.executor import RankError, RankInfo
from moe_runtime.wire.transport import (
    PROTOCOL,
    Alive,
    ControlServer,
    Failed,
    Hello,
    Init,
    Message,
    PeerGoneError,
    ProtocolError,
    RankExited,
    Ready,
    Stop,
    host_name,
    rank_name,
)

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

START_TIMEOUT = 3600.0  # reading a large model from a slow disk takes long
POLL_INTERVAL = 0.1  # between checks for ended processes while waiting for messages
BLAME_GRACE = 0.5  # how long to wait for a report of the rank that failed first
HOST_SILENCE = 8.0
FOLDER_PREFIX = "moe-runtime-"
LONGEST_SOCKET_FOLDER = 60  # of a Unix socket's 107 characters


@dataclass(frozen=True)
class Site:
    """The hosts of the ranks, and how ranks and hosts reach the front.

    Attributes:
        num_ranks: all ranks.
        own_ranks: ranks whose host is the front's process; `shares` are their cores.
        remote_ranks: ranks whose host is a process of its own, one each.
        local_ranks: number of ranks on the front's machine.
        front: addresses at which ranks and hosts reach the front. It listens at the endpoint `bind` and the address
            `store_bind`.
        directory: private directory of the ipc endpoint, removed at the end.
    """

    num_ranks: int
    own_ranks: tuple[int, ...]
    shares: list[list[int]]
    remote_ranks: tuple[int, ...]
    local_ranks: int
    front: FrontAddress
    bind: str
    store_bind: str
    directory: Path | None


def single_host_site(num_ranks: int) -> Site:
    """All ranks on this machine and hosted by this process, in a new private directory."""
    remove_abandoned(socket_folder(), FOLDER_PREFIX)
    directory = make_own_folder(socket_folder(), FOLDER_PREFIX)
    endpoint = f"ipc://{directory}/front"
    return Site(
        num_ranks=num_ranks,
        own_ranks=tuple(range(num_ranks)),
        shares=divide_cores(sorted(os.sched_getaffinity(0)), num_ranks),
        remote_ranks=(),
        local_ranks=num_ranks,
        front=FrontAddress(endpoint, "127.0.0.1"),
        bind=endpoint,
        store_bind="127.0.0.1",
        directory=directory,
    )


def socket_folder() -> Path:
    """The folder for temporary files, or /tmp if that folder's path is too long for a socket in it."""
    folder = Path(tempfile.gettempdir())
    return folder if len(str(folder)) <= LONGEST_SOCKET_FOLDER else Path("/tmp")


class RankGroup:
    """All ranks of one generation.

    Once a rank has died, reported an error or sent an unreadable message, every method except `close` raises RankError,
    which names the rank that failed first. From then on the group can only be closed. If a rank refuses the model or
    the configuration while the ranks load, the error is a ValueError with that rank's message.
    """

    def __init__(self, site: Site, command: Sequence[str] = RANK_COMMAND) -> None:
        self._site = site
        self._generation = 0
        self._loading = True
        self._failure: str | None = None
        self._failed: list[Failed] = []
        self._exited: list[RankExited] = []
        self._inbox: deque[Message] = deque()
        self._greeted: set[str] = set()
        self._pids: dict[int, int] = {}
        self._hosts_heard_at: dict[str, float] = {}
        self._store: TCPStore | None = None
        names = [rank_name(rank) for rank in range(site.num_ranks)] + [host_name(rank) for rank in site.remote_ranks]
        self._server = ControlServer(site.bind, names)
        try:
            self._host = Host(
                site.own_ranks,
                site.shares,
                site.front,
                local_ranks=site.local_ranks,
                generation=self._generation,
                command=command,
            )
        except (OSError, ValueError):
            self._release()
            raise

    def start(self, config: EngineConfig, model_config: ModelConfig, path: Path) -> list[RankInfo]:
        """Tell all ranks to load the model, at the same time, and wait until they are ready."""
        num_ranks = self._site.num_ranks
        deadline = time.monotonic() + START_TIMEOUT
        self._store = _open_store(self._site.store_bind)
        level = logging.getLogger("moe_runtime").getEffectiveLevel()
        init = Init(config, model_config, str(path), num_ranks, self._store.port, level)
        infos: dict[int, RankInfo] = {}
        while len(infos) < num_ranks:
            match self.receive(deadline):
                case Hello(rank=rank):
                    self.send(rank, init)
                case Ready(info):
                    infos[info.rank] = info
                case None:
                    self.fail_silent("loading did not end", START_TIMEOUT, set(range(num_ranks)) - infos.keys())
                case message:
                    raise AssertionError(f"a rank that loads sent {message!r}")
        self._await_hosts(deadline)
        self._loading = False
        return [infos[rank] for rank in range(num_ranks)]

    def _await_hosts(self, deadline: float) -> None:
        """Wait for a message from every host. Until then, neither the front nor the host notices if the other ends."""
        while missing := [rank for rank in self._site.remote_ranks if host_name(rank) not in self._hosts_heard_at]:
            if time.monotonic() > deadline:
                self._fail(f"no message from {', '.join(map(host_name, missing))} within {START_TIMEOUT:g} s")
            self._pump(POLL_INTERVAL)
            self._raise_new_failure()

    def send(self, rank: int, message: Message) -> None:
        """Send to a rank."""
        self._raise_known_failure()
        try:
            self._server.send(rank_name(rank), message)
        except PeerGoneError as error:
            self._blame(str(error))

    def receive(self, deadline: float) -> Message | None:
        """Next message from a rank, or None at `deadline`, a time of `time.monotonic`."""
        self._raise_known_failure()
        while not self._inbox:
            remaining = deadline - time.monotonic()
            self._pump(max(0.0, min(POLL_INTERVAL, remaining)))
            if not self._inbox:
                self._raise_new_failure()
                if remaining <= 0:
                    return None
        return self._inbox.popleft()

    def check(self) -> None:
        """Look for failures, without waiting."""
        self._raise_known_failure()
        self._pump(0.0)
        self._raise_new_failure()

    def fail_silent(self, what: str, seconds: float, ranks: set[int]) -> NoReturn:
        """Raise RankError: `what` within `seconds`, because `ranks` did not answer. Names whom others wait for."""
        are_here = self._site.local_ranks == self._site.num_ranks
        pids = {rank: self._pids[rank] for rank in sorted(ranks) if are_here and rank in self._pids}
        stuck = stuck_ranks(pids)
        named = [f"{rank_name(rank)} (pid {pids[rank]}), which {does}" for rank, does in stuck.items()]
        silent = [rank_name(rank) for rank in sorted(ranks - stuck.keys())]
        text = f"{what} within {seconds:g} s: no answer from {', '.join(named or silent)}"
        if named and silent:
            text += f"; no answer from {', '.join(silent)} either, which may wait for it"
        self._fail(text)

    def close(self, kill: bool = False) -> None:
        """End all ranks and hosts: ask, wait, then kill the rest. Kill at once if a rank has failed. Idempotent."""
        kill = kill or self._failure is not None
        for peer in self._greeted:
            try:
                self._server.send(peer, Stop(failed=kill))
            except PeerGoneError as error:
                logger.debug("%s", error)
        self._greeted.clear()
        self._host.stop(grace=0.0 if kill else STOP_GRACE)
        self._release()

    def _release(self) -> None:
        self._server.close()
        self._store = None
        if self._site.directory is not None:
            remove_own_folder(self._site.directory)

    def _pump(self, timeout: float) -> None:
        """Sort all messages that have arrived. If there are none, wait up to `timeout` seconds for the first."""
        try:
            received = self._server.receive(timeout)
            while received is not None:
                self._sort(*received)
                received = self._server.receive(0.0)
        except ProtocolError as error:
            self._fail(str(error))

    def _sort(self, peer: str, message: Message) -> None:
        match message:
            case Failed():
                self._failed.append(message)
            case RankExited():
                self._exited.append(message)
            case Alive():
                pass
            case Hello():
                self._greet(peer, message)
                if message.role == "rank":  # a host needs no `Init`, and may connect after all ranks are ready
                    self._inbox.append(message)
            case _:
                self._inbox.append(message)
        if peer in self._hosts_heard_at:
            self._hosts_heard_at[peer] = time.monotonic()

    def _greet(self, peer: str, hello: Hello) -> None:
        theirs, ours = (hello.protocol, hello.version), (PROTOCOL, __version__)
        if theirs != ours:
            self._fail(
                f"{peer} (pid {hello.pid}) speaks protocol {theirs[0]} of version {theirs[1]}; "
                f"the front speaks protocol {ours[0]} of version {ours[1]}"
            )
        assert hello.generation == self._generation
        self._greeted.add(peer)
        if hello.role == "rank":
            self._pids[hello.rank] = hello.pid
        if hello.role == "host":
            self._hosts_heard_at[peer] = time.monotonic()

    def _raise_known_failure(self) -> None:
        if self._failure is not None:
            raise RankError(self._failure)

    def _raise_new_failure(self) -> None:
        if self._failed or self._exited or self._host.exits:
            self._blame("a rank failed")
        for peer, heard_at in self._hosts_heard_at.items():
            if time.monotonic() - heard_at > HOST_SILENCE:
                self._fail(f"{peer} has been silent for {HOST_SILENCE:g} s")

    def _blame(self, otherwise: str) -> NoReturn:
        """Raise for the rank that failed first.

        When a rank dies, the others fail in their collective and report it, maybe before the front sees that the first
        process has ended. So this waits briefly, and blames a process that ended without a report before any that sent
        one.
        """
        deadline = time.monotonic() + BLAME_GRACE
        while True:
            complained = {failed.rank for failed in self._failed}
            exited = [end for end in [*self._host.exits, *self._exited] if end.rank not in complained]
            refused = [failed for failed in self._failed if self._loading and failed.kind == "ValueError"]
            if refused or any(end.returncode < 0 for end in exited) or time.monotonic() > deadline:
                break
            self._pump(POLL_INTERVAL / 2)
        if refused:
            self._failure = f"{rank_name(refused[0].rank)} failed: {refused[0].text}"
            raise ValueError(refused[0].text)
        if exited:
            self._fail(describe_exit(exited[0]))
        if self._failed:
            first = self._failed[0]
            self._fail(f"{rank_name(first.rank)} failed: {first.kind}: {first.text}")
        self._fail(otherwise)

    def _fail(self, text: str) -> NoReturn:
        self._failure = text
        raise RankError(text)


def _open_store(address: str) -> TCPStore:
    """The rendezvous store, listening at `address` on a free port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
