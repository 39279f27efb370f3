"""The activation between an expert's two projections."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SwiGLU:
    """`(clamp(up, -limit, limit) + offset) * g * sigmoid(alpha * g)` with `g = min(gate, limit)`.

    With the defaults it is `silu(gate) * up` (arXiv:2002.05202); other numbers are gpt-oss's (`_apply_gate` in
    transformers' `modeling_gpt_oss.py`).

    Raises:
        ValueError: a limit that is not positive.
    """

    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"limit: {self.limit} is not allowed; it must be positive")


PLAIN = SwiGLU()
