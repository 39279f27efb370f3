import numpy as np
import pytest
from balancer_samples import NO_DEADLINE
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.balancer import LayerTime, Placement

COST = LayerTime(seconds_per_slot=40e-6, seconds_per_row=1e-6, seconds_fixed=10e-6)


def measured(rng, cost, num_steps, num_ranks, noise):
    touched = rng.integers(0, 17, (num_steps, num_ranks))
    rows = touched * rng.integers(1, 200, (num_steps, num_ranks))
    seconds = (cost.seconds_per_slot * touched + cost.seconds_per_row * rows).max(axis=1) + cost.seconds_fixed
    return touched, rows, seconds * rng.uniform(1 - noise, 1 + noise, num_steps)


@NO_DEADLINE
@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([0.0, 0.02]))
def test_fit_finds_what_was_measured(seed, num_ranks, noise):
    rng = np.random.default_rng(seed)
    cost = LayerTime(*rng.uniform([5e-6, 1e-7, 0], [100e-6, 2e-6, 30e-6]).tolist())
    touched, rows, seconds = measured(rng, cost, 400, num_ranks, noise)
    fitted = LayerTime.fit(touched, rows, seconds)
    again = (fitted.seconds_per_slot * touched + fitted.seconds_per_row * rows).max(axis=1) + fitted.seconds_fixed
    assert np.abs(again - seconds).max() < (0.1 if noise else 1e-9) * seconds.max()


def test_no_time_is_negative():
    """Rows that cost nothing, with noise that a plain least squares would answer with a negative time."""
    touched = np.array([[1.0], [2.0], [3.0], [4.0]])
    rows = np.array([[10.0], [40.0], [20.0], [80.0]])
    fitted = LayerTime.fit(touched, rows, np.array([1.0, 1.9, 3.1, 3.8]))
    assert fitted.seconds_per_row == 0
    assert fitted.seconds_per_slot == pytest.approx(0.97, rel=0.05)
    assert LayerTime.fit([[0]], [[0]], [0]) == LayerTime(0, 0, 0)


def test_reading_weights_makes_a_second_replica_cost():
    """Decode: few rows per expert. Prefill: many."""
    one = Placement(np.array([[[0, 1, -1], [2, 3, -1]]]), 4, (0,))
    two = Placement(np.array([[[0, 1, 2], [2, 3, 0]]]), 4, (0,))
    decode, prefill = np.array([[4.0, 1.0, 4.0, 1.0]]), np.array([[900.0, 10.0, 30.0, 10.0]])
    assert COST.step_seconds(decode, two) > COST.step_seconds(decode, one)
    assert COST.step_seconds(prefill, two) < COST.step_seconds(prefill, one)


def test_a_step_adds_up_its_layers_and_slow_ranks_take_longer():
    placement = Placement.even(2, 4, 2)
    rows = np.full((2, 4), 1000.0)
    assert COST.step_seconds(rows, placement) == pytest.approx(2 * (10e-6 + 2 * 40e-6 + 2000e-6))
    slow = COST.step_seconds(rows, placement, [1.5, 0.5])
    assert slow == pytest.approx(2 * (10e-6 + (2 * 40e-6 + 2000e-6) / 0.5))
    assert COST.step_seconds(np.zeros((2, 4)), placement) == pytest.approx(20e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0]], [[1.0]], [np.nan]), "seconds: values from nan"),
        (([[1.0]], [[-1.0]], [1.0]), "rows: values from -1.0"),
        (([1.0], [[1.0]], [1.0]), r"touched: .* \[layers measured, ranks\]"),
        (([[1.0]], [[1.0, 2.0]], [1.0]), "seconds: 1 layers are not allowed with touched of shape"),
        (([[1.0]], [[1.0]], [1.0, 2.0]), "seconds: 2 layers are not allowed"),
    ],
)
def test_fit_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerTime.fit(*arguments)


def test_values_are_checked():
    with pytest.raises(ValueError, match="seconds_per_row: -1 is not allowed"):
        LayerTime(1, -1)
    with pytest.raises(ValueError, match=r"rows: shape \(1, 4\) is not allowed; it must be \(2, 4\)"):
        COST.step_seconds(np.ones((1, 4)), Placement.even(2, 4, 2))
