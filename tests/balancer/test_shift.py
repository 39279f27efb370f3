"""What counts as a new load: distance, noise, and the usual change."""

import numpy as np
import pytest
from balancer_samples import NO_DEADLINE
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.balancer.shift import LEAST_SHIFT, ShiftDetector, distance_and_noise

NUM_LAYERS, NUM_EXPERTS = 6, 32


def shares(rng):
    return rng.dirichlet(np.full(NUM_EXPERTS, 0.5), NUM_LAYERS)


def counts(rng, share_LE, num_rows):
    return np.stack([rng.multinomial(num_rows, share_E) for share_E in share_LE])


def test_the_distance_is_the_part_of_the_rows_with_other_experts():
    known = np.array([[3.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
    assert distance_and_noise(known, np.array([[30, 10, 0], [5, 5, 0]]))[0] == pytest.approx(0)
    assert distance_and_noise(known, np.array([[20, 10, 10], [5, 5, 0]]))[0] == pytest.approx(0.25 * 40 / 50)
    assert distance_and_noise(known, np.array([[0, 0, 7], [0, 0, 3]]))[0] == pytest.approx(1)
    # layers without rows are not compared; where nothing was known, all is new
    assert distance_and_noise(known, np.array([[30, 10, 0], [0, 0, 0]]))[0] == pytest.approx(0)
    assert distance_and_noise(known * [[1], [0]], np.array([[30, 10, 0], [10, 0, 0]]))[0] == pytest.approx(0.2)


@NO_DEADLINE
@given(st.integers(0, 2**32), st.sampled_from([200, 2000, 50_000]))
def test_samples_of_the_same_load_are_as_far_as_noise_says(seed, num_rows):
    rng = np.random.default_rng(seed)
    share = shares(rng)
    distance, noise = distance_and_noise(share, counts(rng, share, num_rows))
    assert distance == pytest.approx(noise, rel=0.4)
    assert 0 <= distance <= 1


@pytest.mark.parametrize("num_rows", [100, 1000, 100_000])
def test_a_load_that_stays_is_not_new_but_at_the_beginning(num_rows):
    rng = np.random.default_rng()
    detector, share = ShiftDetector(20), shares(rng)
    assert detector.compare(np.zeros_like(share), counts(rng, share, num_rows)).is_new
    known = counts(rng, share, num_rows) * 1.0
    found = [detector.compare(known, counts(rng, share, num_rows)) for _ in range(100)]
    assert not any(shift.is_new for shift in found)


def test_another_load_is_new_at_once_and_only_once():
    rng = np.random.default_rng()
    detector = ShiftDetector(20)
    known = np.zeros((NUM_LAYERS, NUM_EXPERTS))
    for _ in range(4):
        share = shares(rng)
        found = []
        for _ in range(15):
            rows = counts(rng, share, 3000)
            found.append(detector.compare(known, rows))
            known = rows * 1.0
        assert [shift.is_new for shift in found] == [True] + 14 * [False]


def test_what_jumps_all_the_time_is_no_shift_in_the_end():
    rng = np.random.default_rng()
    detector, loads = ShiftDetector(20), (shares(rng), shares(rng))
    found = [detector.compare(loads[k % 2], counts(rng, loads[1 - k % 2], 3000)).is_new for k in range(60)]
    assert found[0] and not any(found[-20:])


def test_rows_that_come_together_are_noise_too():
    """Each request has its own experts, so samples differ by more than rows drawn one by one."""
    rng = np.random.default_rng()
    detector, share = ShiftDetector(20), shares(rng)

    def clustered():
        requests = [rng.dirichlet(8 * share_E + 1e-9, 12) for share_E in share]
        return np.stack([rng.multinomial(100, each).sum(axis=0) for each in requests])

    rows = clustered()
    assert distance_and_noise(share, rows)[0] > 1.5 * distance_and_noise(share, rows)[1]
    found = [detector.compare(clustered() * 1.0, clustered()).is_new for _ in range(100)]
    assert sum(found[5:]) <= 2


def test_small_changes_and_no_rows_are_not_new():
    rng = np.random.default_rng()
    detector, share = ShiftDetector(20), shares(rng)
    rows = counts(rng, share, 10**7)
    moved = rows + np.roll(rows, 1, axis=1) // 20
    shift = detector.compare(rows * 1.0, moved)
    assert 0 < shift.distance < shift.limit == LEAST_SHIFT and not shift.is_new
    assert not detector.compare(share, np.zeros_like(rows)).is_new


def test_memory_is_checked():
    with pytest.raises(ValueError, match=r"memory: 0.5 is not allowed; it must be at least 1"):
        ShiftDetector(0.5)
