"""Loads of experts as gates produce them, for benchmarks and tests of planning.

Shape suffixes: E logical experts.
"""

from __future__ import annotations

import numpy as np

from moe_runtime.balancer.flow import Floats

BURST = 15.0


def zipf_load(rng: np.random.Generator, num_experts: int, exponent: float = 1.0) -> Floats:
    """[E]: the n-th hottest expert has a load of 1 / n ** exponent; the order of experts is random."""
    return rng.permutation(np.arange(1, num_experts + 1) ** -exponent)


def log_normal_load(rng: np.random.Generator, num_experts: int, sigma: float = 1.0) -> Floats:
    """[E]: independent log-normal loads."""
    return rng.lognormal(0, sigma, num_experts)


def bursty_load(rng: np.random.Generator, num_experts: int) -> Floats:
    """[E]: loads from a gamma distribution (shape 2); one expert in forty has fifteen times as much."""
    load_E = rng.gamma(2, 1, num_experts)
    load_E[rng.choice(num_experts, max(num_experts // 40, 1), replace=False)] *= BURST
    return load_E


SYNTHETIC = {"zipf": zipf_load, "log-normal": log_normal_load, "bursty": bursty_load}


def drifted(rng: np.random.Generator, load: Floats, sigma: float = 0.4) -> Floats:
    """A load of any shape after some time: each expert's load is multiplied by an independent log-normal factor."""
    return load * rng.lognormal(0, sigma, load.shape)
