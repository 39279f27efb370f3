"""A run under load: streams in a closed or an open loop, with memory and CPU time of all processes beside them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from served.processes import cpu_seconds, descendants, pss
from served.server import Server

from load_runs.questions import Question
from load_runs.streams import Stream, ask

SAMPLE_SECONDS = 5.0  # between two looks at the memory
SETTLE_SECONDS = 10.0  # for pages to be free at the end
USED_PAGES = 'state="used"'


@dataclass
class Run:
    """A run.

    Attributes:
        name: such as "closed, 64 streams".
        num_streams: of a closed loop; 0 for an open one.
        start, counted_from, end: by `time.monotonic`; figures are those from `counted_from` on, when load is steady.
        streams, questions: all that ended, and what each answers.
        memory: bytes of all processes (PSS) at times.
        front_cpu, ranks_cpu: CPU seconds in the counted part.
        used_pages: pages that were not free at the end.
    """

    name: str
    num_streams: int
    start: float
    counted_from: float
    end: float = 0.0
    streams: list[Stream] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    front_cpu: float = 0.0
    ranks_cpu: float = 0.0
    used_pages: int = 0

    def read_streams(self) -> None:
        """Read all that came, once the load is over."""
        for stream, question in zip(self.streams, self.questions, strict=True):
            stream.read(question)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that arrived in the counted part."""
        count = 0
        for stream in self.streams:
            before = 0
            for moment, so_far in stream.times:
                count += (so_far - before) * (self.counted_from <= moment <= self.end)
                before = so_far
        return count / (self.end - self.counted_from)

    @property
    def faults(self) -> list[str]:
        return [stream.fault for stream in self.streams if stream.fault]

    @property
    def counted(self) -> list[Stream]:
        """Complete streams that began in the counted part; all, if none has both begun and ended in it."""
        complete = [stream for stream in self.streams if not stream.fault]
        return [stream for stream in complete if stream.start >= self.counted_from] or complete

    @property
    def growth(self) -> float:
        """Growth of the memory from the third quarter to the last, as a share; each quarter's maximum counts.

        Before, memory grows, because pages of the KV cache are used for the first time.
        """
        quarter = (self.end - self.start) / 4
        third, last = (
            [size for moment, size in self.memory if begin <= (moment - self.start) / quarter <= begin + 1]
            for begin in (2, 3)
        )
        return max(last) / max(third) - 1 if third and last else 0.0


async def closed_loop(
    server: Server, questions: Sequence[Question], num_streams: int, seconds: float, ramp: float
) -> Run:
    """`num_streams` clients, each of which asks as soon as it has its answer, for `seconds`."""
    run = Run(f"closed, {num_streams}", num_streams, time.monotonic(), time.monotonic() + ramp)
    running = True

    async def client() -> None:
        while running:
            await _add_stream(server, run, random.choice(questions))

    async with _watched(server, run), asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            group.create_task(client())
        await asyncio.sleep(seconds)
        await _count_cpu(server, run)
        run.end, running = time.monotonic(), False
    await _settle(server, run)
    run.read_streams()
    return run


async def open_loop(server: Server, questions: Sequence[Question], rate: float, seconds: float, ramp: float) -> Run:
    """Questions that arrive at `rate` per second, whatever the answers take (Poisson), for `seconds`."""
    run = Run(f"open, {rate:g}/s", 0, time.monotonic(), time.monotonic() + ramp)

    async def client() -> None:
        await _add_stream(server, run, random.choice(questions))

    async with _watched(server, run), asyncio.TaskGroup() as group:
        while (wait := random.expovariate(rate)) + time.monotonic() < run.start + seconds:
            await asyncio.sleep(wait)
            group.create_task(client())
        await _count_cpu(server, run)
        run.end = time.monotonic()
    await _settle(server, run)
    run.read_streams()
    return run


async def _add_stream(server: Server, run: Run, question: Question) -> None:
    stream = await ask(server.url, question)
    run.streams.append(stream)
    run.questions.append(question)


@contextlib.asynccontextmanager
async def _watched(server: Server, run: Run) -> AsyncIterator[None]:
    """Note the memory of all processes, and their CPU time at the beginning of the counted part."""
    front = server.process.pid

    async def watch() -> None:
        is_counting = False
        while True:
            if not is_counting and time.monotonic() >= run.counted_from:
                is_counting, run.counted_from = True, time.monotonic()
                run.front_cpu, run.ranks_cpu = -cpu_seconds(front), -sum(map(cpu_seconds, descendants(front)))
            run.memory.append((time.monotonic(), sum(map(pss, [front, *descendants(front)]))))
            due = run.counted_from if not is_counting else time.monotonic() + SAMPLE_SECONDS
            await asyncio.sleep(max(0.01, min(SAMPLE_SECONDS, due - time.monotonic())))

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _count_cpu(server: Server, run: Run) -> None:
    front = server.process.pid
    run.front_cpu += cpu_seconds(front)
    run.ranks_cpu += sum(map(cpu_seconds, descendants(front)))


async def _settle(server: Server, run: Run) -> None:
    """Wait until all pages are free, and note those that are not."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        metrics = await asyncio.to_thread(server.metrics)
        run.used_pages = round(sum(value for name, value in metrics.items() if USED_PAGES in name))
        if not run.used_pages or time.monotonic() > deadline:
            return
        await asyncio.sleep(0.2)
