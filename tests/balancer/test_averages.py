"""Moving averages of the load: time constants, the first steps, gaps, and steps counted together."""

import numpy as np
import pytest

from moe_runtime.balancer.averages import LoadAverages

SHAPE = (2, 3, 4)


def random_tokens(rng):
    return rng.integers(0, 50, SHAPE)


def test_the_first_window_is_the_average():
    rng = np.random.default_rng()
    averages, tokens = LoadAverages(SHAPE, 10, 100), random_tokens(rng)
    averages.add(tokens, 4)
    np.testing.assert_allclose(averages.fast, tokens / 4)
    np.testing.assert_allclose(averages.slow, tokens / 4)


def test_while_few_steps_have_passed_it_is_the_mean_so_far():
    rng = np.random.default_rng()
    averages = LoadAverages(SHAPE, 1e3, 1e5)
    windows = [(random_tokens(rng), int(steps)) for steps in rng.integers(1, 9, 6)]
    for tokens, steps in windows:
        averages.add(tokens, steps)
    mean = sum(tokens for tokens, _ in windows) / sum(steps for _, steps in windows)
    np.testing.assert_allclose(averages.slow, mean)
    np.testing.assert_allclose(averages.fast, mean)


def test_after_its_time_constant_without_a_token_an_average_is_a_third():
    rng = np.random.default_rng()
    averages, tokens = LoadAverages(SHAPE, 20, 80), random_tokens(rng) + 1
    for _ in range(200):  # ten times the constant of the slow one
        averages.add(tokens, 4)
    for _ in range(5):
        averages.add(np.zeros(SHAPE, np.int64), 4)
    np.testing.assert_allclose(averages.fast, tokens / 4 * np.exp(-1))
    np.testing.assert_allclose(averages.slow, tokens / 4 * np.exp(-1 / 4))


def test_a_change_shows_in_the_fast_one_first():
    rng = np.random.default_rng()
    averages, before, after = LoadAverages(SHAPE, 5, 50), random_tokens(rng), random_tokens(rng) + 60
    for _ in range(300):
        averages.add(before, 1)
    for _ in range(10):
        averages.add(after, 1)
    way_fast, way_slow = ((average - before) / (after - before) for average in (averages.fast, averages.slow))
    np.testing.assert_allclose(way_fast, 1 - np.exp(-2))
    np.testing.assert_allclose(way_slow, 1 - np.exp(-1 / 5))


def test_how_often_it_is_counted_does_not_matter():
    """Also after a gap of many steps, in which nobody looked."""
    rng = np.random.default_rng()
    often, seldom = LoadAverages(SHAPE, 30, 300), LoadAverages(SHAPE, 30, 300)
    for tokens in (random_tokens(rng) for _ in range(5)):
        for _ in range(400):
            often.add(tokens, 1)
        seldom.add(400 * tokens, 400)
        np.testing.assert_allclose(often.fast, seldom.fast, rtol=1e-4)
        # the beginning is a mean, which depends on the order within a window; it is forgotten
    np.testing.assert_allclose(often.slow, seldom.slow, rtol=0.05)


@pytest.mark.parametrize(("fast", "slow"), [(0, 5), (-1, 5), (6, 5)])
def test_time_constants_are_in_order(fast, slow):
    with pytest.raises(ValueError, match=f"fast_steps: {fast} is not allowed"):
        LoadAverages(SHAPE, fast, slow)


def test_a_window_has_a_step():
    with pytest.raises(ValueError, match="num_steps: 0 is not allowed"):
        LoadAverages(SHAPE, 1, 2).add(np.ones(SHAPE, np.int64), 0)


def test_the_fast_one_can_begin_anew():
    rng = np.random.default_rng()
    averages = LoadAverages(SHAPE, 10, 1000)
    for _ in range(5):
        averages.add(random_tokens(rng), 4)
    slow, after = averages.slow.copy(), [random_tokens(rng) for _ in range(2)]
    averages.restart_fast(after[0], 3)
    np.testing.assert_allclose(averages.fast, after[0] / 3)
    np.testing.assert_allclose(averages.slow, slow)
    averages.add(after[1], 2)
    np.testing.assert_allclose(averages.fast, (after[0] + after[1]) / 5)
