"""Detects whether the load has changed: compares the distance between the experts' shares with noise.

Shape suffixes: L MoE layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEAST_SHIFT = 0.2  # part of the rows that go to other experts; the averages follow smaller changes
TIMES_NOISE = 2.0  # a shift is more than this many times the noise


@dataclass(frozen=True)
class Shift:
    """How far the newest load is from the known load.

    Attributes:
        distance: 0 to 1, the part of the rows that go to other experts.
        limit: a larger distance means a new load.
    """

    distance: float
    limit: float

    @property
    def is_new(self) -> bool:
        """Whether the load has just begun or changed."""
        return self.distance > self.limit


class ShiftDetector:
    """Distinguishes a new load from noise.

    The noise is the larger of two values: the distance expected from sampling if rows were independent, and the recent
    mean distance. The second covers what the first ignores: rows of one request are correlated, and some loads change
    all the time. A change that is usual for a load is not a shift.

    Args:
        memory: time constant of the mean distance, in comparisons.
    """

    def __init__(self, memory: float) -> None:
        if not memory >= 1:
            raise ValueError(f"memory: {memory} is not allowed; it must be at least 1")
        self._memory = memory
        self._usual = 0.0
        self._num_compared = 0

    def compare(self, known_LE: npt.NDArray[np.floating], rows_LE: npt.NDArray[np.number]) -> Shift:
        """Compare the newest load with the known load; only the shares within a layer count.

        Args:
            known_LE: load so far, in any unit. All zeros: no load is known, and any load is new.
            rows_LE: rows counted since. All zeros: not a new load.
        """
        if not rows_LE.any():
            return Shift(0.0, LEAST_SHIFT)
        if not known_LE.any():
            return Shift(1.0, LEAST_SHIFT)
        distance, noise = distance_and_noise(known_LE, rows_LE)
        limit = max(LEAST_SHIFT, TIMES_NOISE * max(noise, self._usual))
        self._num_compared += 1
        # starts from one comparison with distance 0, so that a first shift does not count as usual
        self._usual += (distance - self._usual) / min(self._memory, self._num_compared + 1)
        return Shift(distance, limit)


def distance_and_noise(known_LE: npt.NDArray[np.floating], rows_LE: npt.NDArray[np.number]) -> tuple[float, float]:
    """The total variation distance between the experts' shares, and its mean for samples of the same load.

    Both are half the sum over experts of |difference of shares|, averaged over layers, weighted by rows. If n rows are
    drawn independently, a share p differs from p by sqrt(2 / pi x p (1 - p) / n) on average.

    Args:
        known_LE: load in any unit, not all zeros. A layer of zeros has the largest distance.
        rows_LE: rows counted, not all zeros.
    """
    rows_L = rows_LE.sum(axis=1)
    counted = rows_L > 0  # only these can be compared
    rows_LE, known_LE, rows_L = rows_LE[counted], known_LE[counted], rows_L[counted]
    known_L = known_LE.sum(axis=1)
    share_LE = rows_LE / rows_L[:, None]
    known_share_LE = known_LE / np.where(known_L > 0, known_L, 1)[:, None]
    distance_L = np.where(known_L > 0, np.abs(share_LE - known_share_LE).sum(axis=1) / 2, 1)
    mean_LE = (share_LE + known_share_LE) / 2
    noise_L = np.sqrt(mean_LE * (1 - mean_LE) / (2 * np.pi * rows_L[:, None])).sum(axis=1)
    return float(np.average(distance_L, weights=rows_L)), float(np.average(noise_L, weights=rows_L))
