"""Ranks on CPUs that run decode steps in buckets, as GPUs do; a captured graph is an ordinary call here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from rank_pool import RankContext, RankPool

from moe_runtime.worker import decode_graphs, worker


def capture_as_call(run: Callable[[], None]) -> Callable[[], None]:
    """A replacement for `decode_graphs.CudaCapture` without a GPU: replaying the graph runs the call again."""
    return run


@contextmanager
def ranks_in_torch(pool: RankPool, *, buckets: bool) -> Iterator[None]:
    """Workers created in this context run torch instead of native kernels, with or without buckets."""
    pool.run(_patch, buckets)
    try:
        yield
    finally:
        pool.run(_undo)


def _patch(context: RankContext, buckets: bool) -> None:
    patch = context.kept["patch"] = pytest.MonkeyPatch()
    patch.setattr(worker, "native_kernels", lambda device, group: None)
    patch.setattr(decode_graphs, "SHORTEST_CONTEXT", 16)
    if buckets:
        patch.setattr(worker, "capture_on", lambda device: capture_as_call)


def _undo(context: RankContext) -> None:
    context.kept.pop("patch").undo()
