"""Whether the load is another than it was: a distance between shares of experts, held against noise.

Shape suffixes: L MoE layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEAST_SHIFT = 0.2  # of the rows with other experts; less is left to the averages
TIMES_NOISE = 2.0  # a shift is so many times as far as noise goes


@dataclass(frozen=True)
class Shift:
    """How far the newest load is from the one that was known.

    Attributes:
        distance: 0 to 1, the part of the rows that are with other experts.
        limit: what is further than this is another load.
    """

    distance: float
    limit: float

    @property
    def is_new(self) -> bool:
        """Whether the load has just begun, or is another than it was."""
        return self.distance > self.limit


class ShiftDetector:
    """Tells new load from noise.

    The noise is the larger of two: what sampling alone would give, were every row drawn by itself, and the mean
    distance of late. The second covers what the first does not know: rows of a request come together, and some loads
    jump all the time, which is then their nature and no shift.

    Args:
        memory: comparisons after which the mean distance has forgotten.
    """

    def __init__(self, memory: float) -> None:
        if not memory >= 1:
            raise ValueError(f"memory: {memory} is not allowed; it must be at least 1")
        self._memory = memory
        self._usual = 0.0
        self._num_compared = 0

    def compare(self, known_LE: npt.NDArray[np.floating], rows_LE: npt.NDArray[np.number]) -> Shift:
        """Hold the newest load against the known one, of which only the shares within a layer count.

        Args:
            known_LE: load so far, in any unit; zeros where none is known, and then any load is new.
            rows_LE: rows counted since. Zeros are not new.
        """
        if not rows_LE.any():
            return Shift(0.0, LEAST_SHIFT)
        if not known_LE.any():
            return Shift(1.0, LEAST_SHIFT)
        distance, noise = distance_and_noise(known_LE, rows_LE)
        limit = max(LEAST_SHIFT, TIMES_NOISE * max(noise, self._usual))
        self._num_compared += 1
        # as if there had been one comparison without a distance before, so that a first shift is not what is usual
        self._usual += (distance - self._usual) / min(self._memory, self._num_compared + 1)
        return Shift(distance, limit)


def distance_and_noise(known_LE: npt.NDArray[np.floating], rows_LE: npt.NDArray[np.number]) -> tuple[float, float]:
    """The total variation distance between the shares of experts, and the mean one of samples of the same load.

    Both are half the sum over experts of |difference of shares|, means over layers, weighted by rows. A share p of n
    rows, each drawn by itself, differs from p by sqrt(2 / pi x p (1 - p) / n) in the mean.

    Args:
        known_LE: load in any unit, not all zeros. A layer of zeros is as far as can be.
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
