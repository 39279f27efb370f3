"""A pool of rank processes for tests: runs any function on all ranks of a gloo group, or a whole engine over them."""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.wire.executor import CountsReport, RankInfo
from moe_runtime.wire.messages import RankResult, SlotReport, SlotTask, StepPlan

DEADLINE = 120.0


@dataclass
class RankContext:
    """First argument of a function in the pool: its rank, the group, and storage that lasts between calls."""

    rank: int
    num_ranks: int
    group: Any
    kept: dict[str, Any] = field(default_factory=dict)


class RankPool:
    """`num_ranks` processes that run functions together."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._dir = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")  # torch is imported once for all pools
        context.set_forkserver_preload(["rank_pool", "torch.distributed", "moe_runtime.worker.worker", "transformers"])
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            args = (rank, num_ranks, str(Path(self._dir.name) / "store"), theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def send(self, function: Callable[..., Any], *args: Any) -> None:
        seed = random.getrandbits(32)
        for rank, pipe in enumerate(self._pipes):
            pipe.send((function, args, seed + rank))

    def receive(self) -> list[Any]:
        """Each rank's answer to the oldest call; an exception on a rank is raised here with its traceback."""
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(DEADLINE), f"rank {rank} of the pool did not answer"
            answers.append(pipe.recv())
        failures = [f"rank {rank} failed:\n{value}" for rank, (good, value) in enumerate(answers) if not good]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(RankContext, *args)` on every rank; the results in order of rank."""
        self.send(function, *args)
        return self.receive()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._dir.cleanup()


def _serve(rank: int, num_ranks: int, store_path: str, pipe: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist
    from seeds import seed_all

    torch.set_num_threads(1)
    store = dist.FileStore(store_path, num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60))
    context = RankContext(rank, num_ranks, dist.group.WORLD)
    while (call := pipe.recv()) is not None:
        function, args, seed = call
        seed_all(seed)
        try:
            pipe.send((True, function(context, *args)))
        except Exception:  # noqa: BLE001 - the test's process raises it
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class PoolExecutor:
    """An `Executor` whose ranks are workers in a pool, so that engines start fast."""

    def __init__(self, pool: RankPool, config: EngineConfig, model_config: ModelConfig, path: Path) -> None:
        self.pool = pool
        self.max_inflight = 2
        self.ranks: list[RankInfo] = pool.run(_make_worker, config, model_config, path)
        self._calls: deque[str] = deque()  # calls that the ranks have not answered
        self._reports: list[CountsReport | SlotReport] = []

    def submit(self, plan: StepPlan) -> None:
        self._send("step", _step, plan)

    def collect(self) -> list[RankResult]:
        while self._calls[0] != "step":
            self._take_report()
        self._calls.popleft()
        return self.pool.receive()

    def expert_counts(self) -> np.ndarray:
        while self._calls:
            self._take_report()
        return np.stack(self.pool.run(_expert_counts))

    def forget(self) -> None:
        while self._calls:
            self._take_report()
        self._reports.clear()
        self.pool.run(_forget)

    def request_counts(self) -> None:
        self._send("counts", _expert_counts)

    def send_task(self, rank: int, task: SlotTask) -> None:
        self._send("task", _run_task, rank, task)

    def reports(self) -> list[CountsReport | SlotReport]:
        while self._calls and self._calls[0] != "step":
            self._take_report()
        reports, self._reports = self._reports, []
        return reports

    def bytes_read(self) -> list[int]:
        return self.pool.run(_bytes_read)

    def check(self) -> None:
        pass

    def close(self) -> None:
        while self._calls:
            self._calls.popleft()
            self.pool.receive()
        self.pool.run(_drop_worker)

    def _send(self, kind: str, function: Callable[..., Any], *args: Any) -> None:
        self.pool.send(function, *args)
        self._calls.append(kind)

    def _take_report(self) -> None:
        kind, answers = self._calls.popleft(), self.pool.receive()
        if kind == "counts":
            self._reports += [CountsReport(rank, counts) for rank, counts in enumerate(answers)]
        elif kind == "task":
            self._reports += [report for report in answers if report is not None]


def _make_worker(context: RankContext, config: EngineConfig, model_config: ModelConfig, path: Path) -> RankInfo:
    from moe_runtime.worker.worker import Worker

    group = context.group if context.num_ranks > 1 else None
    context.kept["worker"] = Worker(
        config,
        model_config,
        path,
        rank=context.rank,
        num_ranks=context.num_ranks,
        group=group,
        local_ranks=context.num_ranks,
    )
    return context.kept["worker"].info


def _step(context: RankContext, plan: StepPlan) -> RankResult:
    return context.kept["worker"].step(plan.of_rank(context.rank))


def _run_task(context: RankContext, rank: int, task: SlotTask) -> SlotReport | None:
    return context.kept["worker"].run_task(task) if context.rank == rank else None


def _expert_counts(context: RankContext) -> np.ndarray:
    return context.kept["worker"].expert_counts()


def _forget(context: RankContext) -> None:
    context.kept["worker"].forget()


def _bytes_read(context: RankContext) -> int:
    return context.kept["worker"].source.bytes_read


def _drop_worker(context: RankContext) -> None:
    del context.kept["worker"]
