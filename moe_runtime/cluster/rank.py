"""Rank processes: each sends `Hello` to the front, loads the model, then runs the plans it receives until `Stop`.

The ranks of a host are forked from one process, so they share the memory of the libraries that it has imported. A rank
ends when the front tells it to, or when the pipe from its host closes, so that no rank outlives its host.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moe_runtime.system.pages import library_mappings, release_library_pages
from moe_runtime.system.signals import END_SIGNALS
from moe_runtime.wire.executor import RankInfo
from moe_runtime.wire.messages import RankResult, RankStep, SlotReport, SlotTask
from moe_runtime.wire.transport import (
    Counts,
    CountsRequest,
    Dealer,
    Failed,
    Forget,
    Hello,
    Init,
    Ready,
    Result,
    RunStep,
    Stop,
    Task,
    TaskReport,
    rank_name,
)

if TYPE_CHECKING:
    import numpy as np
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

COLLECTIVE_MARGIN = 10.0  # seconds from the front's deadline for a step to that of a collective, which is later
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
MMAP_THRESHOLD = 2 << 20  # bytes; a freed allocation of at least this size goes back to the system


@dataclass(frozen=True)
class RankArguments:
    """The command-line arguments that the host gives a rank.

    Attributes:
        cores: the cores that the rank is pinned to.
        num_threads: threads for its computations.
        local_ranks: the number of ranks on the machine.
    """

    rank: int
    cores: tuple[int, ...]
    num_threads: int
    generation: int
    local_ranks: int
    control: str
    store_host: str


def parse_arguments(arguments: Sequence[str]) -> tuple[list[RankArguments], int]:
    """The ranks of the host, and the file descriptor for reports to the host of how they start and end."""
    parser = argparse.ArgumentParser("moe_runtime.cluster.rank", description="The ranks of a host, which starts them.")
    parser.add_argument("--rank", action="append", required=True, metavar="RANK:THREADS:CORE,CORE")
    for name in ("--generation", "--local-ranks", "--reports"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--control", "--store-host"):
        parser.add_argument(name, required=True)
    given = vars(parser.parse_args(arguments))
    reports = given.pop("reports")
    ranks = []
    for seat in given.pop("rank"):
        rank, num_threads, cores = seat.split(":")
        ranks.append(RankArguments(int(rank), tuple(map(int, cores.split(","))), int(num_threads), **given))
    return ranks, reports


class RankWorker(Protocol):
    """The part of `worker.worker.Worker` that the message loop uses."""

    @property
    def info(self) -> RankInfo: ...

    def step(self, step: RankStep) -> RankResult: ...

    def expert_counts(self) -> np.ndarray: ...

    def forget(self) -> None: ...

    def run_task(self, task: SlotTask) -> SlotReport: ...


def main() -> None:
    """Run the ranks of a host: the entry point of `python -m moe_runtime.cluster.rank`."""
    import torch.distributed as dist

    import moe_runtime.all2all.symmetric
    import moe_runtime.worker.worker  # noqa: F401  before the fork, so that the ranks share it

    release_library_pages(library_mappings())
    run_rank(load_worker)
    if dist.is_initialized():
        dist.destroy_process_group()


def run_rank(make_worker: Callable[[RankArguments, Init], RankWorker]) -> None:
    """Fork into the ranks that the command line names. Each serves the front, with the worker that `make_worker` loads,
    until the front sends `Stop`.

    An exception ends a rank with code 1, after the rank has told the front. A ValueError while loading is the user's
    mistake: the front reports it, and no traceback is printed here.
    """
    seat = fork_ranks(sys.argv[1:])
    _watch_host()
    logging.basicConfig(format=f"[rank {seat.rank}] %(levelname)s %(name)s: %(message)s")
    front = Dealer(seat.control, rank_name(seat.rank))
    loaded = False
    try:
        front.send(Hello("rank", seat.rank, seat.generation, os.getpid()))
        init = front.receive(None)
        if isinstance(init, Init):
            logging.getLogger("moe_runtime").setLevel(init.log_level)
            worker = make_worker(seat, init)
            loaded = True
            front.send(Ready(worker.info))
            _serve(front, worker, seat.rank)
        else:
            assert isinstance(init, Stop)
    except BaseException as error:
        front.send(Failed(seat.rank, type(error).__name__, str(error)))
        if isinstance(error, ValueError) and not loaded:
            sys.exit(1)
        raise
    finally:
        front.close()


def _serve(front: Dealer, worker: RankWorker, rank: int) -> None:
    while True:
        message = front.receive(None)
        match message:
            case RunStep(step):
                front.send(Result(worker.step(step)))
            case CountsRequest(request_id):
                front.send(Counts.from_array(rank, request_id, worker.expert_counts()))
            case Forget():
                worker.forget()
            case Task(task):
                front.send(TaskReport(worker.run_task(task)))
            case Stop():
                return
            case _:
                raise AssertionError(f"the front sent a rank {message!r}")


def fork_ranks(arguments: Sequence[str]) -> RankArguments:
    """Fork into the ranks that the arguments name. Returns in each of them, pinned to its cores.

    The parent process waits until all ranks have ended, reports each start and end to the host, and exits with 0. The
    ranks share the modules it has imported. So it must have no threads, and must not have used anything that does not
    survive a fork.
    """
    seats, reports = parse_arguments(arguments)
    os.set_inheritable(reports, False)  # not by processes that the ranks start
    for number in END_SIGNALS:  # the front handles them
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    gc.collect()
    gc.freeze()  # objects that the collector does not visit stay shared
    rank_of: dict[int, int] = {}
    for seat in seats:
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _die_with_parent()
            if os.getppid() != parent:  # the parent ended before the call above
                os._exit(1)
            os.sched_setaffinity(0, seat.cores)
            os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(seat.num_threads)
            _give_memory_back()
            return seat
        rank_of[pid] = seat.rank
        os.write(reports, b"%d %d started\n" % (seat.rank, pid))
    while rank_of:
        pid, status = os.wait()
        os.write(reports, b"%d %d %d\n" % (rank_of.pop(pid), pid, os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _give_memory_back() -> None:
    """Make malloc return large allocations to the system when they are freed. A step needs its rows only briefly.

    By default malloc keeps more and more of them, each in the size of an earlier request.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, MMAP_THRESHOLD)


def _watch_host() -> None:
    """End this process when its host has ended, which closes the pipe from it."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # returns when the host has closed its end
        os._exit(1)

    threading.Thread(target=watch, name="host watch", daemon=True).start()


def join_group(seat: RankArguments, init: Init) -> ProcessGroup | None:
    """The process group of all ranks of this generation, created through the front's store; None for a single rank."""
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    if init.num_ranks == 1:
        return None
    store = TCPStore(seat.store_host, init.store_port, is_master=False)
    dist.init_process_group(
        backend="nccl" if init.config.device != "cpu" and torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"generation/{seat.generation}", store),
        rank=seat.rank,
        world_size=init.num_ranks,
        timeout=timedelta(seconds=init.config.step_timeout + COLLECTIVE_MARGIN),
    )
    return dist.group.WORLD


def load_worker(seat: RankArguments, init: Init) -> RankWorker:
    """Join the other ranks and load this rank's share of the model."""
    import torch

    from moe_runtime.worker.worker import Worker

    torch.set_num_threads(seat.num_threads)
    return Worker(
        init.config,
        init.model_config,
        Path(init.path),
        rank=seat.rank,
        num_ranks=init.num_ranks,
        group=join_group(seat, init),
        local_ranks=seat.local_ranks,
    )


if __name__ == "__main__":
    main()
