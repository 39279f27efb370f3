"""Moving averages of the load: how many tokens an expert has in a step, recently and in the long run.

Shape suffixes: L MoE layers, E logical experts; 2 is for prefill and decode.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class LoadAverages:
    """Exponential averages of tokens per step, phase, layer and expert, one fast and one slow.

    Args:
        shape: (2, L, E).
        fast_steps, slow_steps: after this number of steps without a token, the average has fallen to 1 / e.

    Attributes:
        fast, slow: float64 [2, L, E], tokens per step. While few steps have passed, the mean so far.
    """

    def __init__(self, shape: tuple[int, int, int], fast_steps: float, slow_steps: float) -> None:
        if not 0 < fast_steps <= slow_steps:
            raise ValueError(f"fast_steps: {fast_steps} is not allowed; it must be above 0 and at most slow_steps")
        self.fast, self.slow = np.zeros(shape), np.zeros(shape)
        self._steps = (fast_steps, slow_steps)
        self._num_steps = [0.0, 0.0]  # since the start of each average

    def add(self, tokens_2LE: npt.NDArray[np.integer], num_steps: int) -> None:
        """Add the tokens of the last `num_steps` steps."""
        if num_steps < 1:
            raise ValueError(f"num_steps: {num_steps} is not allowed; it must be at least 1")
        per_step = tokens_2LE / num_steps
        for number, average in enumerate((self.fast, self.slow)):
            self._num_steps[number] += num_steps
            share = max(-np.expm1(-num_steps / self._steps[number]), num_steps / self._num_steps[number])
            average += share * (per_step - average)

    def restart_fast(self, tokens_2LE: npt.NDArray[np.integer], num_steps: int) -> None:
        """Restart the fast average with the tokens of the last `num_steps` steps, whether or not they were added."""
        self._num_steps[0] = num_steps
        self.fast[:] = tokens_2LE / num_steps
