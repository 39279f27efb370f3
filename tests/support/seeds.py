"""One seed for a whole run: the seed of each test and shared fixture is computed from it and from the name."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_generators = random.Random()  # seeds for numpy generators without a seed; hypothesis resets the shared generators
_make_generator = np.random.default_rng


def default_rng(seed: Any = None) -> np.random.Generator:
    """As numpy's, but a generator without a seed gets one from the test's seed."""
    return _make_generator(_generators.getrandbits(64) if seed is None else seed)


np.random.default_rng = default_rng


def seed_for(run_seed: int, name: str) -> int:
    return zlib.crc32(name.encode(), run_seed & 0xFFFFFFFF)


def seed_all(seed: int) -> None:
    """Seed all generators that tests draw from: torch, numpy, random."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    _generators.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside depend on `seed`; draws afterwards are as if nothing had been drawn inside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), _generators.getstate()
    seed_all(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        _generators.setstate(states[3])
