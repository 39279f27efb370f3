"""Shared fixtures: one pool of ranks per `ep_size`, kept for the whole session."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# Many small models on few cores, often several processes at once: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `python -m pytest` puts the root on the path, where our links `kernels`, `serve`, ... pass for packages.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent.parent]

import pytest
import torch
from rank_pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(n)` gives `n` processes in a gloo group; they are started once and end with the session."""
    pools: dict[int, RankPool] = {}

    def get(num_ranks: int) -> RankPool:
        if num_ranks not in pools:
            pools[num_ranks] = RankPool(num_ranks)
        return pools[num_ranks]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of each test's own, drawn anew every run and shown when the test fails."""
    value = zlib.crc32(request.node.nodeid.encode()) ^ random.SystemRandom().getrandbits(32)
    torch.manual_seed(value)
    request.node.user_properties.append(("seed", value))
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.failed:
        report.sections.append(("seed", str(dict(item.user_properties).get("seed"))))
    return report
