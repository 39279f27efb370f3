"""The rebalancer over ranks that only count: when it checks the load, how it uses counts, and the replica choices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from counting_ranks import CountingRanks
from fakes import model_config

from moe_runtime.balancer.decide import balancedness
from moe_runtime.balancer.live.mover import Rebalance
from moe_runtime.balancer.live.rebalancer import ROUTE_STEPS, Rebalancer
from moe_runtime.balancer.placement import EMPTY, Placement
from moe_runtime.balancer.split import rank_loads
from moe_runtime.config.engine import EngineConfig

NUM_LAYERS, NUM_EXPERTS = 2, 4  # of the fake model


def make(interval: int = 100, balance: str = "auto", placement: Path | None = None) -> tuple[Rebalancer, CountingRanks]:
    ranks = CountingRanks(2, NUM_LAYERS, NUM_EXPERTS)
    config = EngineConfig(
        "fake",
        ep_size=2,
        redundant_experts=1,
        balance=balance,
        balance_interval=interval,
        placement=None if placement is None else str(placement),
    )
    return Rebalancer(config, model_config(), ranks), ranks


def with_replica(folder: Path) -> Path:
    """A placement in whose first layer expert 0 has two replicas."""
    slots = np.array([[[0, 1, 2], [0, 3, EMPTY]], [[0, 1, EMPTY], [2, 3, EMPTY]]])
    Placement(slots, NUM_EXPERTS, (1, 2)).save(folder / "placement.json")
    return folder / "placement.json"


def rows_per_step(rebalancer: Rebalancer) -> float:
    return sum(rebalancer.stats().rank_rows_per_step)


@pytest.mark.parametrize("late", [False, True])
def test_counts_that_somebody_fetched_do_not_yield_to_older_ones(late: bool) -> None:
    """Ranks were asked, and before their answers are taken in somebody fetches newer counts."""
    rebalancer, ranks = make(interval=5)
    ranks.run(rebalancer.prepare, 5)
    rebalancer.tick()
    rebalancer.tick()  # the first look, at which all load is new
    ranks.run(rebalancer.prepare, 5)
    rebalancer.tick()
    assert ranks.asked
    answers = ranks.asked
    ranks.run(rebalancer.prepare, 20)
    newest = ranks.expert_counts()
    if late:  # the answers come even later
        ranks.asked = []
    rebalancer.take_counts(newest)
    rows = rows_per_step(rebalancer)
    assert rows == pytest.approx(newest.sum() / 30, rel=0.2)
    if late:
        ranks.asked = answers
    rebalancer.tick()
    assert rows_per_step(rebalancer) == rows
    ranks.run(rebalancer.prepare, 1)
    rebalancer.take_counts(ranks.expert_counts())  # what is new is that one step, not all since the older counts
    assert rows_per_step(rebalancer) == pytest.approx(newest.sum() / 30, rel=0.2)


def test_it_looks_once_in_an_interval() -> None:
    rebalancer, ranks = make(interval=10)
    asked = []
    for _ in range(35):
        ranks.run(rebalancer.prepare, 1)
        rebalancer.tick()
        asked.append(len(ranks.asked))
    assert [step for step, count in enumerate(asked, 1) if count] == [10, 20, 30]


def test_where_nobody_watches_and_nothing_is_replicated_ranks_are_left_alone(tmp_path: Path) -> None:
    rebalancer, ranks = make(interval=3, balance="off")
    for _ in range(20):
        ranks.run(rebalancer.prepare, 1)
        rebalancer.tick()
        assert not ranks.asked


def test_replicas_follow_the_counts_of_the_last_steps(tmp_path: Path) -> None:
    rebalancer, ranks = make(balance="off", placement=with_replica(tmp_path))
    ranks.counts[:, :, 0, :2] += 1000  # counted before the first step: all of expert 0 must go to where 1 is not
    told: list[int] = []
    for step in range(1, 3 * ROUTE_STEPS + 1):
        plans = []
        ranks.run(lambda plan, plans=plans: plans.append(rebalancer.prepare(plan)), 1)
        rebalancer.tick()
        if step > 1 and any(work.replica_choices for work in plans[0].ranks):
            told.append(step)
            for work in plans[0].ranks:
                assert all((route.layer, route.expert) == (0, 0) for route in work.replica_choices)
    assert told and told[0] == ROUTE_STEPS + 2, "asked after ROUTE_STEPS, answered a step later, told with the next"
    assert (np.diff(told) >= ROUTE_STEPS).all()


def test_stats_show_the_load_under_the_placement() -> None:
    rebalancer, ranks = make()
    ranks.counts[:, :, :, :2] += 10_000  # rank 0 holds experts 0 and 1
    ranks.run(rebalancer.prepare, 10)
    rebalancer.take_counts(ranks.expert_counts())
    loads = rank_loads(ranks.expert_counts().sum(axis=(0, 1)) / 10, rebalancer.placement.slots)
    stats = rebalancer.stats()
    assert stats.balancedness == pytest.approx(balancedness(loads)) and stats.balancedness < 0.6
    assert stats.balancedness_slow == pytest.approx(stats.balancedness)
    np.testing.assert_allclose(stats.rank_rows_per_step, loads.sum(axis=0))
    for _ in range(40):  # now the other rank has more: the slow average still remembers
        ranks.counts[:, :, :, 2:] += 20_000
        ranks.run(rebalancer.prepare, 10)
        rebalancer.take_counts(ranks.expert_counts())
    rows_W = rebalancer.stats().rank_rows_per_step
    assert rows_W[1] > rows_W[0]
    assert rebalancer.stats().balancedness_slow > rebalancer.stats().balancedness


def test_a_dry_run_is_weighed_by_all_counts_there_are() -> None:
    rebalancer, ranks = make(balance="off")
    ranks.counts[:, :, :, :2] += 10_000
    ranks.run(rebalancer.prepare, 4)
    rebalancer.take_counts(ranks.expert_counts())
    planned = rebalancer.begin(dry_run=True)
    assert planned.done and planned.planned_moves > 0 and not rebalancer.is_migrating
    assert planned.balancedness_before < 0.6 < planned.balancedness_planned


def test_a_migration_in_words() -> None:
    """Before the balancedness after it is known, and then."""
    rebalance = Rebalance(False, 0.7, 0.95, 5, done=True, moves=[{}] * 4, copied_bytes=2_500_000, rollbacks=["why"])
    start = "4 of 5 planned moves in 0.00 s, 2.5 MB copied, 1 rollbacks; balancedness was 0.700, "
    assert str(rebalance) == f"{start}planned 0.950; placement version 0"
    rebalance.balancedness_after = 0.9
    assert str(rebalance) == f"{start}is now 0.900, planned 0.950; placement version 0"
