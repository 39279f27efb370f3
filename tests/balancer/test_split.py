import numpy as np
import pytest
from balancer_samples import NO_DEADLINE
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import layer_cases, least_level

from moe_runtime.balancer import plan_eplb, plan_placement, split_tokens
from moe_runtime.balancer.flow import balance
from moe_runtime.balancer.synthetic import SYNTHETIC, drifted


def check_shares(share, load, slots):
    held = np.array([(slots == expert).any(axis=1) for expert in range(len(load))])
    assert share.shape == held.shape
    assert share.dtype == np.float64
    assert (share >= 0).all()
    assert (share[~held] == 0).all()
    np.testing.assert_allclose(share.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(share[load == 0], (held / held.sum(axis=1, keepdims=True))[load == 0])


@NO_DEADLINE
@given(layer_cases())
def test_the_busiest_rank_is_as_light_as_can_be(case):
    load, slots, speed = case
    share = split_tokens(load, slots, speed)
    check_shares(share, load, slots)
    speed = np.ones(len(slots)) if speed is None else speed
    level = ((load @ share) / speed).max()
    assert level == pytest.approx(least_level(load, slots, speed), rel=3e-9)


@pytest.mark.parametrize("kind", SYNTHETIC)
@pytest.mark.parametrize("planner", [plan_eplb, plan_placement])
def test_at_full_size_a_set_of_ranks_proves_it(kind, planner):
    rng = np.random.default_rng()
    planned_for = SYNTHETIC[kind](rng, 256)
    slots = planner(planned_for[None], 32, 9).placement.slots[0]
    for load in (planned_for, drifted(rng, planned_for)):
        share = split_tokens(load, slots)
        check_shares(share, load, slots)
        held = share > 0
        held[slots[slots >= 0], np.nonzero(slots >= 0)[0]] = True
        replicated = held.sum(axis=1) > 1
        flow = balance(load[~replicated] @ held[~replicated], np.ones(32), load[replicated], held[replicated] * 1.0)
        cannot_leave = load[~held[:, ~flow.busiest_W].any(axis=1)].sum()
        assert (load @ share).max() == pytest.approx(cannot_leave / flow.busiest_W.sum(), rel=3e-9)


def test_it_depends_on_nothing_but_its_arguments():
    rng = np.random.default_rng()
    load = SYNTHETIC["zipf"](rng, 64)
    slots = plan_eplb(load[None], 8, 10).placement.slots[0]
    load = drifted(rng, load)
    before = load.copy()
    first = split_tokens(load, slots)
    assert (split_tokens(load.tolist(), slots.tolist()) == first).all()
    assert (load == before).all()
    np.testing.assert_allclose(split_tokens(load * 1e-300, slots), first, atol=1e-6)


def test_two_replicas_on_one_rank_are_one():
    share = split_tokens([4.0, 2.0], [[0, 0], [1, -1]])
    assert share.tolist() == [[1, 0], [0, 1]]


@NO_DEADLINE
@given(st.lists(st.sampled_from([0.0, 1e-320, 1e-5, 1.0, 3.0, 1e300, 1.7e308]), min_size=4, max_size=4))
def test_loads_of_any_size(load):
    share = split_tokens(load, [[0, 1, 2], [3, 0, 1], [2, 0, -1]])
    assert np.isfinite(share).all()
    np.testing.assert_allclose(share.sum(axis=1), 1)


@pytest.mark.parametrize(
    ("load", "slots", "speed", "message"),
    [
        ([1.0, np.nan], [[0], [1]], None, "load_layer: values from nan to nan are not allowed; .* finite"),
        ([1.0, np.inf], [[0], [1]], None, "load_layer: values from 1.0 to inf"),
        ([1.0, -2.0], [[0], [1]], None, "load_layer: values from -2.0 to 1.0"),
        ([[1.0, 2.0]], [[0], [1]], None, r"load_layer: .*shape \(1, 2\) .* numbers \[experts\]"),
        ([], [[0], [1]], None, "load_layer: .* that is not empty"),
        (["a", "b"], [[0], [1]], None, "load_layer: an array of <U1"),
        ([1.0, 2.0], [0, 1], None, r"slots_layer: .* it must be of integers \[ranks, slots\]"),
        ([1.0, 2.0], [[0.0], [1.0]], None, "slots_layer: an array of float64"),
        ([1.0, 2.0], [[0], [2]], None, "slots_layer: expert 2 is not allowed; it must be from 0 to 1"),
        ([1.0, 2.0], [[0, 1], [-2, 1]], None, "slots_layer: expert -2 is not allowed"),
        ([1.0, 2.0], [[0], [0]], None, "slots_layer: expert 1 has no slot"),
        ([1.0, 2.0], [[-1], [-1]], None, "slots_layer: expert 0 has no slot"),
        ([1.0, 2.0], [[0], [1]], [1.0], "rank_speed: .* 2 finite numbers above 0"),
        ([1.0, 2.0], [[0], [1]], [1.0, 0.0], "rank_speed"),
        ([1.0, 2.0], [[0], [1]], [1.0, np.nan], "rank_speed"),
    ],
)
def test_bad_input_is_refused_by_name(load, slots, speed, message):
    with pytest.raises(ValueError, match=message) as error:
        split_tokens(load, slots, speed)
    assert "\n" not in str(error.value)
