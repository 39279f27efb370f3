"""Sends a workload to a target and records when its tokens arrive."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moe_runtime.bench.targets import RequestError, Target
from moe_runtime.bench.workload import Job


@dataclass
class Record:
    """The record of one request. Times are in seconds since the start of the run.

    Attributes:
        input_len, output_len: tokens of the prompt, and tokens to generate.
        start: when the request was sent.
        times: when tokens arrived; several may have arrived at once.
        num_tokens: how many tokens arrived.
        error: why the request failed, or None.
    """

    input_len: int
    output_len: int
    start: float = 0.0
    times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.times[0] - self.start

    @property
    def e2el(self) -> float:
        """End-to-end latency: until the last token."""
        return self.times[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there is only one."""
        return None if self.num_tokens < 2 else (self.times[-1] - self.times[0]) / (self.num_tokens - 1)

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies: the gaps in `times`."""
        return [after - before for before, after in itertools.pairwise(self.times)]


@dataclass(frozen=True)
class Run:
    """All requests at one rate, and the seconds from the first arrival to the last end."""

    request_rate: float
    records: list[Record]
    duration: float


async def run_jobs(
    target: Target,
    jobs: Sequence[Job],
    *,
    request_rate: float,
    max_concurrency: int | None,
    timeout: float,
    progress: Callable[[Record], object],
) -> Run:
    """Send each job when it arrives, or later, once fewer than `max_concurrency` are in progress. Await all.

    Args:
        timeout: seconds that each may take.
        progress: called with each record once its request has ended or failed.
    """
    clock = asyncio.get_running_loop().time
    begin = clock()
    places = asyncio.Semaphore(max_concurrency or len(jobs))

    async def run(job: Job) -> Record:
        record = Record(len(job.prompt), job.output_len)
        await asyncio.sleep(job.arrival - (clock() - begin))
        async with places:
            record.start = clock() - begin
            record.error = await _stream(target, job, record, lambda: clock() - begin, timeout)
        progress(record)
        return record

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(job)) for job in jobs]
    return Run(request_rate, [task.result() for task in tasks], clock() - begin)


async def _stream(target: Target, job: Job, record: Record, now: Callable[[], float], timeout: float) -> str | None:
    """Run one request; returns why it failed, or None."""
    try:
        async with asyncio.timeout(timeout), contextlib.aclosing(target.stream(job.prompt, job.output_len)) as stream:
            async for num_tokens in stream:
                record.times.append(now())
                record.num_tokens += num_tokens
    except TimeoutError:
        return f"did not end within {timeout:g} s"
    except RequestError as error:
        return str(error)
    if record.num_tokens != job.output_len:
        return f"gave {record.num_tokens} of {job.output_len} tokens"
    return None
