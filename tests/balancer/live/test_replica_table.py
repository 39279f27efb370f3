"""Replica tables: they add up to the best shares, are sent once, and follow the counts if that pays."""

from __future__ import annotations

import numpy as np
import pytest
from balancer_samples import NO_DEADLINE, random_placement
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.balancer.live.replica_table import SLACK, ReplicaTables
from moe_runtime.balancer.placement import EMPTY, Placement
from moe_runtime.balancer.split import rank_loads
from moe_runtime.wire.messages import REPLICA_TURNS, ReplicaChoice

Tables = list[dict[tuple[int, int], list[int]]]


def begin(placement: Placement) -> tuple[ReplicaTables, Tables]:
    """Replica tables, and what each rank knows: the first slot of each expert."""
    first = {key: [int(slot)] for key, slot in np.ndenumerate(placement.first_slot)}
    return ReplicaTables(placement), [dict(first) for _ in range(placement.num_ranks)]


def tell(replicas: ReplicaTables, tables: Tables) -> list[ReplicaChoice]:
    """Give ranks their news; all of them."""
    for _ in range(10):
        replicas.advance()
    news = replicas.take_news() or []
    for table, told in zip(tables, news, strict=False):
        for route in told:
            table[route.layer, route.expert] = route.slots
    assert replicas.take_news() is None
    return [route for told in news for route in told]


def computed(placement: Placement, tables: Tables, counts_VLE: np.ndarray) -> np.ndarray:
    """float64 [L, W]: tokens that ranks compute, each table gone through in proportion."""
    load_LW = np.zeros(placement.slots.shape[:2])
    for (rank, layer, expert), count in np.ndenumerate(counts_VLE):
        slots = tables[rank][layer, expert]
        for slot in slots:
            assert placement.slots[layer].ravel()[slot] == expert, "a slot of that very expert"
            load_LW[layer, slot // placement.max_slots] += count / len(slots)
    return load_LW


@st.composite
def cases(draw: st.DrawFn) -> tuple[Placement, np.random.Generator]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_ranks = draw(st.integers(2, 4))
    return random_placement(rng, (1, 3), draw(st.integers(num_ranks, 8)), num_ranks, draw(st.integers(0, 2))), rng


def random_counts(rng: np.random.Generator, placement: Placement, most: int) -> np.ndarray:
    shape = (placement.num_ranks, placement.num_layers, placement.num_experts)
    return rng.integers(0, most, shape) * rng.integers(0, 2, shape)


@NO_DEADLINE
@given(cases())
def test_new_tables_meet_the_best_shares(case: tuple[Placement, np.random.Generator]) -> None:
    placement, rng = case
    replicas, tables = begin(placement)
    tell(replicas, tables)
    counts = random_counts(rng, placement, 12)
    replicas.weigh(counts)
    replicas.refresh()
    tell(replicas, tables)
    best = rank_loads(counts.sum(axis=0), placement.slots)
    # whole tokens, and of a table of 64 entries: each replica is within a token or so of its share
    room = placement.num_experts * placement.num_ranks
    assert np.abs(computed(placement, tables, counts) - best).max() <= room


@NO_DEADLINE
@given(cases())
def test_after_any_counts_ranks_are_near_the_least_maximum(case: tuple[Placement, np.random.Generator]) -> None:
    placement, rng = case
    replicas, tables = begin(placement)
    for _ in range(4):
        counts = random_counts(rng, placement, 4) * REPLICA_TURNS
        replicas.weigh(counts)
        tell(replicas, tables)
        least_L = rank_loads(counts.sum(axis=0), placement.slots).max(axis=1)
        most_L = computed(placement, tables, counts).max(axis=1)
        # a table has 64 entries, so a rank's part of each expert is off by at most one of them
        rounding = placement.num_experts * placement.num_ranks * 2 * counts.max() / REPLICA_TURNS
        assert (most_L <= (1 + SLACK) * least_L + rounding).all()


@NO_DEADLINE
@given(cases(), st.integers(0, 2**32))
def test_every_change_of_the_placement_reaches_the_ranks(
    case: tuple[Placement, np.random.Generator], seed: int
) -> None:
    placement, rng = case
    replicas, tables = begin(placement)
    for step in range(4):
        tell(replicas, tables)
        counts = random_counts(rng, placement, 9)
        computed(placement, tables, counts)  # checks every slot
        assert replicas.has_replicas == bool((placement.hosts.sum(axis=1) > 1).any())
        replicas.weigh(counts)
        other = random_placement(np.random.default_rng([seed, step]), (1, 3), placement.num_experts, 4, 3)
        if other.slots.shape == placement.slots.shape:
            changed = replicas.place(other)
            assert changed.tolist() == [n for n in (0, 1) if (other.slots[n] != placement.slots[n]).any()]
            placement = other


PAIR = Placement(np.array([[[0, 1, 2], [0, 3, EMPTY]], [[0, 1, EMPTY], [2, 3, EMPTY]]]), 4, (0, 1))


def counts_of(*of_expert_0: int) -> np.ndarray:
    counts = np.full((2, 2, 4), 10)
    counts[:, 0, 0] = of_expert_0
    return counts


def test_only_layers_with_replicas_follow_counts_and_only_where_that_is_worth_it() -> None:
    replicas, tables = begin(PAIR)
    tell(replicas, tables)
    replicas.weigh(counts_of(40, 40))
    assert {route.layer for route in tell(replicas, tables)} == {0}
    before = [dict(table) for table in tables]
    replicas.weigh(counts_of(41, 40))  # tables made for these would differ, and gain next to nothing
    assert tell(replicas, tables) == [] and tables == before
    replicas.refresh()
    assert {(route.layer, route.expert) for route in tell(replicas, tables)} <= {(0, 0)}
    replicas.weigh(counts_of(400, 400))
    assert tell(replicas, tables), "the busiest rank would have far more than it must"


def test_tokens_stay_on_their_rank_as_far_as_shares_allow() -> None:
    replicas, tables = begin(PAIR)
    replicas.weigh(counts_of(32, 32))
    replicas.refresh()
    tell(replicas, tables)
    # 40 tokens of experts 1 and 2 on rank 0, 20 of expert 3 on rank 1: of 64 tokens rank 0 takes 22, rank 1 takes 42
    per_rank = [[slot // PAIR.max_slots for slot in table[0, 0]] for table in tables]
    assert set(per_rank[1]) == {1}, "rank 1 keeps all of its own"
    assert sum(rank == 0 for rank in per_rank[0]) == pytest.approx(22 / 32 * REPLICA_TURNS, abs=1)


def test_the_same_counts_give_the_same_tables() -> None:
    counts = np.random.default_rng().integers(0, 50, (2, 2, 4))
    found = []
    for _ in range(2):
        replicas, tables = begin(PAIR)
        replicas.weigh(counts)
        replicas.refresh()
        tell(replicas, tables)
        found.append(tables)
    assert found[0] == found[1]


def test_a_step_has_a_share_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tables a layer, one for each rank; the layer that is worst off comes first."""
    slots = np.array([[[0, 1, 2], [0, 3, EMPTY]]] * 3)
    replicas, tables = begin(Placement(slots, 4, (0, 1, 2)))
    tell(replicas, tables)
    counts = np.full((2, 3, 4), 10)
    # of expert 0 half goes to each rank; rank 0 has two of the others: 540 and 520, 70 and 50, 140 and 120
    counts[:, :, 0] = 500, 30, 100
    monkeypatch.setattr("moe_runtime.balancer.live.replica_table.TABLES_A_STEP", 2)
    replicas.weigh(counts)
    found = []
    for _ in range(4):
        replicas.advance()
        found.append({route.layer for told in replicas.take_news() or [] for route in told})
    assert found == [{1}, {2}, set(), set()]
