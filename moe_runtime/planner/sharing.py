"""Ranks of a node that start together and share its bandwidth: when a rank ends, the remaining ones get faster.

Shape suffixes: W ranks, C numbers of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def counts_up_to(most: int) -> list[int]:
    """Numbers of ranks whose speed is computed: powers of two, and the largest number."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


def ending_times(counts: Sequence[int], seconds_CW: Floats) -> Floats:
    """When each rank ends.

    Args:
        counts: numbers of ranks that work at once, ascending, from 1 to all.
        seconds_CW: each rank's time if this number of ranks always worked; linear between the numbers. 0: no work.
    """
    left_W = (seconds_CW[-1] > 0).astype(np.float64)  # share of its work that is left
    ends_W: Floats = np.zeros_like(left_W)
    now = 0.0
    while (works_W := left_W > 0).any():
        active = int(works_W.sum())
        above = int(np.searchsorted(counts, active))
        below = max(above - 1, 0)
        share = (active - counts[below]) / max(counts[above] - counts[below], 1)
        seconds_W = (1 - share) * seconds_CW[below] + share * seconds_CW[above]
        passed = float((left_W * seconds_W)[works_W].min())
        now += passed
        ends_W[works_W] = now
        left_W[works_W] -= passed / seconds_W[works_W]
        left_W[left_W < 1e-9] = 0.0
    return ends_W
