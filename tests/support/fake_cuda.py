"""A fake `torch.cuda` with streams, events and graphs that only records the calls, in order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch


class FakeCuda:
    """Tests record their own work with `note`.

    Attributes:
        log: everything recorded, in order of the calls.
        before: for each piece of work, the work that a GPU must have finished before, by stream order and waits.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.before: dict[str, set[str]] = {}
        self.current = FakeStream(self, "main")
        fakes = {
            "current_stream": lambda device=None: self.current,
            "Stream": lambda device=None: FakeStream(self, "side"),
            "stream": self.stream,
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": lambda: FakeGraph(self),
            "graph": self.graph,
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)

    def note(self, what: str) -> None:
        self.log.append(f"{what} on {self.current.name}")
        self.before[what] = set(self.current.done)
        self.current.done.add(what)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, **options: Any) -> Iterator[None]:
        assert options["pool"] == "pool"
        self.log.append("capture begins")
        yield
        self.log.append("capture ends")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name
        self.done: set[str] = set()

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")
        self.done |= other.done


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.note("replay")
