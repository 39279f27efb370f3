"""Learns how long steps take, and says how many prompt tokens a step may run beside decode rows. No torch.

D(n) is the time of a step of n decode rows alone: the median of the last ones. C(p) is what a step takes beyond that if
it runs p prompt tokens too, on the rank that has most. It is measured by every step with both. C(p) / p falls as p
grows, as every chunk has a fixed cost: on CPUs, it reads experts that the decode rows do not. So

    p = A / (C(q) / q)    for a chunk of q tokens that ran just before

takes at most the time A if p > q, and from step to step p approaches the chunk that takes A. The median of the last
three chunks keeps one slow step from counting.

A step may take `slowdown` times D(n), so A = AIM (slowdown - 1) D(n). Where even `LEAST_CHUNK` tokens take longer than
A, no chunk is small enough. Then a chunk may take twice as long as that: half of its time goes into its tokens, so the
prompt takes about twice as long as in large chunks, and slows the decode rows for a shorter time.

Tokens never depend on chunks, so what is measured here changes no answer.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

LEAST_CHUNK = 16
AIM = 0.9  # of the time that the bound leaves: steps of one kind differ in their times
DECODE_WINDOW = 9  # steps without prompts, for each number of rows
CHUNK_WINDOW = 3
REFRESH = 256  # steps with both, after which D is measured again
NEAR = 0.25  # D of a number of rows that differs by at most this share is used


class StepTime:
    """The prompt budget of steps, from the times of earlier ones. Call `planned` and `took` once for each, in order.

    Args:
        slowdown: how long a step with decode rows may take, as a multiple of the same step without prompts; above 1.
            Infinity sets no bound.
    """

    def __init__(self, slowdown: float) -> None:
        assert slowdown > 1
        self._slowdown = slowdown
        self._inflight: deque[tuple[int, int]] = deque()
        self._decode: dict[int, deque[float]] = {}
        self._measured_at: dict[int, int] = {}  # of each number of rows: `_num_mixed` when it was last measured
        self._num_mixed = 0
        self._per_token: deque[float] = deque(maxlen=CHUNK_WINDOW)  # C(p) / p
        self._least: deque[float] = deque([0.0], maxlen=CHUNK_WINDOW)  # C(LEAST_CHUNK), or a little less

    def planned(self, num_decode: int, num_prompt: int) -> None:
        """A step is submitted; its fullest ranks have these decode rows and prompt tokens."""
        self._inflight.append((num_decode, num_prompt))

    def took(self, seconds: float) -> None:
        """The oldest of the submitted steps has ended."""
        num_decode, num_prompt = self._inflight.popleft()
        if not num_prompt:
            self._decode.setdefault(num_decode, deque(maxlen=DECODE_WINDOW)).append(seconds)
            self._measured_at[num_decode] = self._num_mixed
        elif num_decode:
            self._num_mixed += 1
            alone = self.decode_seconds(num_decode)
            if alone is not None and num_prompt >= LEAST_CHUNK:
                per_token = max(seconds - alone, 0.0) / num_prompt
                self._per_token.append(per_token)
                if num_prompt < 2 * LEAST_CHUNK:
                    self._least.append(per_token * LEAST_CHUNK)

    def prompt_budget(self, num_decode: int) -> int | None:
        """Prompt tokens that a rank may run in the next step; None means any number.

        It is 0 if the time of the decode rows alone is not known: the step measures it.

        Args:
            num_decode: decode rows of the rank that has most.
        """
        if not num_decode or math.isinf(self._slowdown):
            return None
        alone = self.decode_seconds(num_decode)
        if alone is None:
            return 0
        if not self._per_token:
            return LEAST_CHUNK
        allowed, least = AIM * (self._slowdown - 1) * alone, median(self._least)
        if least > allowed:
            allowed = 2 * least
        per_token = median(self._per_token)
        return max(LEAST_CHUNK, int(allowed / per_token)) if per_token else None

    def decode_seconds(self, num_decode: int) -> float | None:
        """The time of a step of decode rows alone; None if it has not been measured lately."""
        fresh = (rows for rows, when in self._measured_at.items() if self._num_mixed - when < REFRESH)
        nearest = min(fresh, key=lambda rows: abs(rows - num_decode), default=0)
        return median(self._decode[nearest]) if abs(nearest - num_decode) <= NEAR * num_decode else None
