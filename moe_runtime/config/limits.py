"""Limits on the assignments of experts and ranks in a step, from the engine's options. No torch."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from moe_runtime.config.checks import is_number

OVERFLOWS = ("queue", "reroute", "drop")


@dataclass(frozen=True)
class Limits:
    """The options `capacity_factor`, `overflow` and `balance_epsilon`; see `EngineConfig`.

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    capacity_factor: float | None = None
    overflow: str = "queue"
    balance_epsilon: float | None = None

    def __post_init__(self) -> None:
        factor, epsilon = self.capacity_factor, self.balance_epsilon
        if factor is not None:
            if not (is_number(factor) and 0 < factor <= sys.float_info.max):
                raise ValueError(f"capacity_factor: {factor!r} is not allowed; it must be a finite number above 0")
        elif self.overflow != "queue":
            raise ValueError(f"overflow: {self.overflow!r} is not allowed; without capacity_factor nothing overflows")
        if epsilon is not None and not (is_number(epsilon) and 0 < epsilon < 1):
            raise ValueError(f"balance_epsilon: {epsilon!r} is not allowed; it must be a number between 0 and 1")

    @property
    def any(self) -> bool:
        """Whether anything is limited."""
        return self.capacity_factor is not None or self.balance_epsilon is not None

    @property
    def queues(self) -> bool:
        """Whether assignments beyond the capacity wait for further dispatch rounds."""
        return self.capacity_factor is not None and self.overflow == "queue"

    @property
    def limits_choices(self) -> bool:
        """Whether assignments beyond the capacity are rerouted or dropped."""
        return self.capacity_factor is not None and self.overflow != "queue"

    @property
    def changes_experts(self) -> bool:
        """Whether the experts that a token uses may depend on the batch and on the ranks' load."""
        return self.limits_choices or self.balance_epsilon is not None

    def capacity(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """Maximum assignments of a rank's tokens to an expert: `ceil(factor * T * K / E)` (arXiv 2006.16668)."""
        assert self.capacity_factor is not None
        return max(1, math.ceil(min(num_tokens, self.capacity_factor * num_tokens * top_k / num_experts)))
