"""How `auto` follows the load, on simulated ranks: constant loads, shifting loads, bursts of many lengths."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np
import pytest
from simulated_ranks import NUM_EXPERTS, NUM_LAYERS, NUM_RANKS, SimulatedRanks

from moe_runtime.balancer.shift import LEAST_SHIFT

HOT = NUM_EXPERTS // NUM_RANKS


def loads() -> Iterator[np.ndarray]:
    """One after another: in each a rank of the even placement has most of the rows, never twice the same one."""
    rng = np.random.default_rng()
    ranks = rng.permutation(NUM_RANKS)
    for number in range(NUM_RANKS):
        weights = rng.uniform(0.5, 1.5, (NUM_LAYERS, NUM_EXPERTS))
        weights[:, HOT * ranks[number] :][:, :HOT] *= 6
        yield weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("copy_seconds", [0.001, 0.1, 1.0])
def test_load_that_stays_is_balanced_once(monkeypatch: pytest.MonkeyPatch, copy_seconds: float) -> None:
    shares = []
    for load in (next(loads()) for _ in range(3)):
        ranks = SimulatedRanks(monkeypatch, copy_seconds)
        assert ranks.balancedness(load) < 0.6
        ranks.serve(load, 15)
        # Averages of the first looks are rough, and where copies cost next to nothing every better plan pays back: how
        # often experts move until here is chance. From here on it is not.
        at_first, looks = ranks.rebalancer.stats().moves, ranks.num_looks
        assert ranks.balancedness(load) > 0.9
        ranks.serve(load, 60)
        shares.append((ranks.rebalancer.stats().moves - at_first) / at_first)
        assert sum(look > looks for look in ranks.moved_at) <= 2
    assert statistics.median(shares) <= 1 / 4, "one of 150 loads moves more again"


@pytest.mark.parametrize("copy_seconds", [0.001, 0.1])
def test_after_a_shift_it_is_balanced_again_in_a_few_looks(
    monkeypatch: pytest.MonkeyPatch, copy_seconds: float
) -> None:
    ranks = SimulatedRanks(monkeypatch, copy_seconds)
    for number, load in enumerate(loads()):
        ranks.serve(load, 5 if number else 15)  # at first, layers must have been measured
        if number:
            figures = [d for d in ranks.rebalancer.decisions if d["reason"] == "new load"][-1]
            assert figures["shift"] > figures["shift_limit"] >= LEAST_SHIFT
        assert ranks.balancedness(load) > 0.9
        ranks.serve(load, 15)


def test_after_a_rebalance_that_was_asked_for_the_next_must_earn_its_cost_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks, load = SimulatedRanks(monkeypatch, 0.001), next(loads())
    ranks.serve(load, 30)
    before = ranks.rebalancer.decisions[-1]["horizon_seconds"]
    ranks.rebalancer.begin()
    ranks.serve(load, 2)
    assert not ranks.rebalancer.is_migrating
    assert 0 < ranks.rebalancer.decisions[-1]["horizon_seconds"] < before / 2


@pytest.mark.parametrize(("steady", "burst"), [(10, 1), (12, 6), (1, 1)])
def test_bursts_of_any_rhythm_are_not_chased_at_a_loss(
    monkeypatch: pytest.MonkeyPatch, steady: int, burst: int
) -> None:
    """Held against the placement for the mean of both loads, which knows the rhythm beforehand and needs no moves."""
    first, second, *_ = loads()
    seconds = []
    for balance, copy_seconds in (("off", 1.0), ("auto", 0.01), ("auto", 1.0)):
        ranks = SimulatedRanks(monkeypatch, copy_seconds, balance)
        if balance == "off":
            ranks.place_for(steady * first + burst * second)
        ranks.serve(first, 15)
        start, copied_before = ranks.now, ranks.seconds_copied
        while ranks.num_looks < 50:
            ranks.serve(second, burst)
            ranks.serve(first, steady)
        seconds.append(ranks.now - start)
        assert ranks.seconds_copied - copied_before < 0.1 * seconds[-1]
    assert max(seconds[1:]) < 1.15 * seconds[0]
