"""A rank's process: says hello to the front, loads the model, then runs the plans it is sent until it is told to stop.

It ends when the front says so or when the pipe from its host closes, so that no rank outlives its host.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moe_runtime.executor import RankInfo
from moe_runtime.messages import RankPlan, RankResult, SlotReport, SlotTask, StepPlan
from moe_runtime.transport import (
    Counts,
    CountsRequest,
    Dealer,
    Failed,
    Hello,
    Init,
    Plan,
    Ready,
    Result,
    Stop,
    Task,
    TaskReport,
    rank_name,
)

if TYPE_CHECKING:
    import numpy as np
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

COLLECTIVE_MARGIN = 10.0  # seconds by which the front's deadline for a step comes before that of a collective
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RankArguments:
    """What the host tells a rank on its command line. `local_ranks` is the number of ranks on the machine."""

    rank: int
    generation: int
    local_ranks: int
    control: str
    store_host: str

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> RankArguments:
        parser = argparse.ArgumentParser("moe_runtime.worker", description="A rank's process; started by its host.")
        for name in ("--rank", "--generation", "--local-ranks"):
            parser.add_argument(name, type=int, required=True)
        for name in ("--control", "--store-host"):
            parser.add_argument(name, required=True)
        return cls(**vars(parser.parse_args(arguments)))


class RankWorker(Protocol):
    """What the message loop needs of `moe_runtime.worker.Worker`."""

    @property
    def info(self) -> RankInfo: ...

    def step(self, plan: StepPlan) -> RankResult: ...

    def expert_counts(self) -> np.ndarray: ...

    def run_task(self, task: SlotTask) -> SlotReport: ...


def main() -> None:
    """Be a rank: the entry point of `python -m moe_runtime.worker`."""
    run_rank(load_worker)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def run_rank(make_worker: Callable[[RankArguments, Init], RankWorker]) -> None:
    """Serve the front, with the worker that `make_worker` loads, until it says stop.

    An exception ends the process with code 1, after the front has been told. One ValueError while loading is the
    user's mistake, which the front reports; it leaves no traceback here.
    """
    seat = RankArguments.parse(sys.argv[1:])
    _end_with_host()
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
            _serve(front, worker, seat.rank, init.num_ranks)
        else:
            assert isinstance(init, Stop)
    except BaseException as error:
        front.send(Failed(seat.rank, type(error).__name__, str(error)))
        if isinstance(error, ValueError) and not loaded:
            sys.exit(1)
        raise
    finally:
        front.close()


def _serve(front: Dealer, worker: RankWorker, rank: int, num_ranks: int) -> None:
    idle = RankPlan()
    while True:
        message = front.receive(None)
        match message:
            case Plan(plan):
                ranks = [idle] * num_ranks
                ranks[rank] = plan.ranks[0]
                front.send(Result(worker.step(replace(plan, ranks=ranks))))
            case CountsRequest(request_id):
                front.send(Counts.from_array(rank, request_id, worker.expert_counts()))
            case Task(task):
                front.send(TaskReport(worker.run_task(task)))
            case Stop():
                return
            case _:
                raise AssertionError(f"the front sent a rank {message!r}")


def _end_with_host() -> None:
    """Leave Ctrl-C and SIGTERM to the front, and die with the host: when its pipe closes, or by the kernel's hand."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # returns when the host has closed its end
        os._exit(1)

    threading.Thread(target=watch, name="host watch", daemon=True).start()


def join_group(seat: RankArguments, init: Init) -> ProcessGroup | None:
    """The process group of all ranks of this generation, made through the front's store; None for a single rank."""
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
    from moe_runtime.worker import Worker

    return Worker(
        init.config,
        init.model_config,
        Path(init.path),
        rank=seat.rank,
        num_ranks=init.num_ranks,
        group=join_group(seat, init),
        local_ranks=seat.local_ranks,
    )
