import numpy as np
import pytest
from balancer_samples import NO_DEADLINE
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import layer_cases

from moe_runtime.balancer import choose_slots, quotas, replica_table, slots_by_rank, split_tokens
from moe_runtime.balancer.choice import whole_shares


@st.composite
def steps(draw, max_count=12):
    """(counts [ranks, experts], shares, slots, generator) of a step, for replicas on random ranks."""
    _, slots, _ = draw(layer_cases())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_experts = slots.max() + 1
    counts = rng.integers(0, max_count + 1, (len(slots), num_experts)) * rng.integers(0, 2, (len(slots), num_experts))
    return counts, split_tokens(counts.sum(axis=0), slots), slots, rng


@NO_DEADLINE
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_whole_shares_add_up_and_are_near(seed, num_ranks):
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(num_ranks, 0.4), 20)
    count = rng.integers(0, 50, 20)
    whole = whole_shares(share, count)
    assert (whole.sum(axis=1) == count).all()
    assert (np.abs(whole - share * count[:, None]) < 1 + 1e-6).all()
    even = whole_shares(np.full((1, 3), 1 / 3), np.array([6]))
    assert even.tolist() == [[2, 2, 2]]


@NO_DEADLINE
@given(steps())
def test_quotas_of_all_ranks_make_up_the_shares(step):
    counts, share, _, _ = step
    each = quotas(counts, share)
    assert (each >= 0).all()
    assert (each.sum(axis=2) == counts).all()
    room = whole_shares(share, counts.sum(axis=0))
    assert (each.sum(axis=0) == room).all()
    for rank, quota in enumerate(each):
        assert (quota[:, rank] == np.minimum(counts[rank], room[:, rank])).all(), "a rank keeps what it may"


@NO_DEADLINE
@given(steps())
def test_a_step_like_the_last_meets_the_quotas_exactly(step):
    counts, share, slots, rng = step
    num_experts = counts.shape[1]
    slot_EW = slots_by_rank(slots, num_experts)
    computed = np.zeros(slots.size, np.int64)
    for rank, (count, quota) in enumerate(zip(counts, quotas(counts, share), strict=True)):
        table = replica_table(quota, share, slot_EW, rank)
        experts = rng.permutation(np.repeat(np.arange(num_experts), count))[:, None]
        chosen = choose_slots(table, experts)
        assert chosen.dtype == np.int32
        assert (slots.ravel()[chosen] == experts).all(), "a replica of that very expert"
        computed += np.bincount(chosen.ravel(), minlength=slots.size)
    room = whole_shares(share, counts.sum(axis=0))
    for slot, expert in enumerate(slots.ravel()):
        assert computed[slot] == (room[expert, slot // slots.shape[1]] if expert >= 0 else 0)


@NO_DEADLINE
@given(steps(max_count=40), st.integers(1, 300))
def test_any_number_of_tokens_keeps_near_the_quotas(step, num_tokens):
    counts, share, slots, _ = step
    num_experts = counts.shape[1]
    slot_EW = slots_by_rank(slots, num_experts)
    quota = quotas(counts, share)[0]
    table = replica_table(quota, share, slot_EW, 0)
    rounds = -(-num_tokens // table.shape[1])
    for expert in np.flatnonzero(quota.sum(axis=1)):
        taken = np.bincount(table[expert][np.arange(num_tokens) % table.shape[1]], minlength=slots.size)
        replicas = np.flatnonzero(slot_EW[expert] >= 0)
        off = taken[slot_EW[expert, replicas]] - num_tokens * quota[expert, replicas] / quota[expert].sum()
        assert np.abs(off).max() < rounds * (1 if len(replicas) <= 2 else 2) + 1e-6


def test_ranks_that_had_no_token_do_not_all_begin_with_the_same_replica():
    share = np.full((1, 4), 0.25)
    tables = [replica_table(np.zeros((1, 4), np.int64), share, np.arange(4)[None], rank)[0] for rank in range(4)]
    assert len({int(table[0]) for table in tables}) == 4
    for table in tables:
        assert np.bincount(table).tolist() == [16, 16, 16, 16]


def test_locality_comes_within_the_quotas():
    counts = np.array([[10], [2]])
    assert quotas(counts, np.array([[0.5, 0.5]])).tolist() == [[[6, 4]], [[0, 2]]]
    assert quotas(counts, np.array([[1.0, 0.0]])).tolist() == [[[10, 0]], [[2, 0]]]


def test_equal_replicas_begin_at_home():
    quota = np.array([[3, 3]])
    for rank in range(2):
        table = replica_table(quota, np.array([[0.5, 0.5]]), np.array([[0, 1]]), rank, length=4)
        assert table.tolist() == [[rank, 1 - rank, rank, 1 - rank]]


def test_experts_without_replicas_have_one_slot():
    slot_EW = slots_by_rank(np.array([[2, 0], [1, -1]]), 3)
    assert slot_EW.tolist() == [[1, -1], [-1, 2], [0, -1]]
    table = replica_table(np.array([[3, 0], [0, 0], [1, 0]]), (slot_EW >= 0) * 1.0, slot_EW, 0, length=2)
    assert table.tolist() == [[1, 1], [2, 2], [0, 0]]
    assert choose_slots(table, np.array([[1, 0], [2, 1]])).tolist() == [[2, 1], [0, 2]]


def test_experts_of_several_layers_may_be_stacked():
    rng = np.random.default_rng()
    slots = np.array([[0, 1, 2], [3, 0, 1]])
    counts = rng.integers(0, 9, (2, 2, 4))  # layers, ranks, experts
    share = [split_tokens(count.sum(axis=0), slots) for count in counts]
    slot_EW = slots_by_rank(slots, 4)
    apart = [replica_table(quotas(counts[n], share[n])[1], share[n], slot_EW, 1) for n in range(2)]
    both = np.concatenate(share)
    quota = quotas(np.concatenate(list(counts), axis=1), both)[1]
    together = replica_table(quota, both, np.tile(slot_EW, (2, 1)), 1)
    assert (together == np.concatenate(apart)).all()


@pytest.mark.parametrize("length", [0, 3, -2])
def test_the_table_has_a_power_of_two(length):
    with pytest.raises(ValueError, match=f"length: {length} is not allowed; it must be a power of two"):
        replica_table(np.ones((1, 1), np.int64), np.ones((1, 1)), np.zeros((1, 1), np.int64), 0, length)
