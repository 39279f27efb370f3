"""End times of ranks that share a node's bandwidth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.planner.sharing import counts_up_to, ending_times


def test_the_last_is_faster_alone_by_hand():
    """Alone they take 2 and 4 seconds, together 3 and 6: after 3 the second has half its work left, which takes 2."""
    seconds = np.array([[2.0, 4.0, 0.0], [3.0, 6.0, 0.0], [9.0, 9.0, 0.0]])
    assert ending_times([1, 2, 3], seconds).tolist() == pytest.approx([3.0, 5.0, 0.0])


def test_between_the_counts_it_is_straight():
    """Three at work are between 2 (a second) and 4 (3 seconds); all end together."""
    seconds = np.array([[0.5] * 3, [1.0] * 3, [3.0] * 3])
    assert ending_times([1, 2, 4], seconds).tolist() == pytest.approx([2.0] * 3)


@given(st.lists(st.just(0.0) | st.floats(1e-9, 1e3), min_size=1, max_size=9), st.floats(0, 3), st.floats(0, 1))
def test_each_ends_between_alone_and_always_beside_all(works, slower, bends):
    """With a slowdown that grows with the number at work; those with more work end later."""
    counts = counts_up_to(len(works))
    assert counts[0] == 1 or len(works) == 1
    factor = np.array([1 + slower * ((count - 1) / len(works)) ** bends for count in counts])
    work = np.array(works)
    ends = ending_times(counts, factor[:, None] * work)
    assert (ends >= work * (1 - 1e-9)).all() and (ends <= work * factor[-1] * (1 + 1e-9)).all()
    order = np.argsort(work)
    assert (np.diff(ends[order]) >= -1e-9 * (1 + ends.max())).all()
    if len(set(works)) == 1:
        assert ends == pytest.approx(work * factor[-1])
