"""Bounds the requests that wait for a rank, and says when a refused client may try again. No torch."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_runtime.engine.stats import EngineStats

RATE_SECONDS = 30.0  # over which the rate of admissions is measured
SAMPLE_SECONDS = 0.5
MOST_RETRY_SECONDS = 60


class QueueFullError(RuntimeError):
    """As many requests wait as may.

    Attributes:
        retry_after: seconds after which the client may try again.
    """

    def __init__(self, max_queue: int, retry_after: int) -> None:
        super().__init__(f"the server has {max_queue} requests waiting and takes no more now; try again later")
        self.retry_after = retry_after


class Admission:
    """Counts the requests that wait, from what the engine reports after each step and what was sent to it since.

    As long as nothing waited in the last step, free places in the batch count as well: they are filled next. A client's
    request counts with all its choices, but is taken if there is room for one: so the bound can be exceeded by one
    request's choices, and no request is too large for the queue.

    Args:
        max_queue: requests that may wait.
        max_running: sequences that all ranks together run in one step.
        clock: seconds.
    """

    def __init__(self, max_queue: int, max_running: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_queue = max_queue
        self._max_running = max_running
        self._clock = clock
        self._num_running = self._num_waiting = 0
        self._num_sent = self._num_accepted = 0  # since the last report; those accepted are part of those sent
        self._samples: deque[tuple[float, int]] = deque()  # (time, admissions so far) while requests waited
        self._rate = 0.0
        self.num_refused = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait, as far as is known."""
        return self._num_waiting + self._num_sent

    def check(self) -> None:
        """Raise QueueFullError if no further request may wait."""
        free = 0 if self._num_waiting else self._max_running - self._num_running
        if self.num_waiting >= self._max_queue + max(0, free):
            self.num_refused += 1
            raise QueueFullError(self._max_queue, self.retry_after())

    def sent(self) -> None:
        """A request was sent to the engine."""
        self._num_sent += 1

    def accepted(self) -> None:
        """The engine has taken a request; the next report counts it."""
        self._num_accepted += 1

    def refused(self) -> None:
        """The engine has refused a request."""
        self._num_sent -= 1

    def note(self, stats: EngineStats) -> None:
        """The engine's report after a step."""
        self._num_running, self._num_waiting = stats.num_running, stats.num_waiting
        self._num_sent -= self._num_accepted
        self._num_accepted = 0
        if not stats.num_waiting:  # then admissions tell how many arrive, not how many could be taken
            self._samples.clear()
            return
        now = self._clock()
        if not self._samples or now >= self._samples[-1][0] + SAMPLE_SECONDS:
            self._samples.append((now, stats.num_admitted))
            while now - self._samples[0][0] > RATE_SECONDS:
                self._samples.popleft()
            (start, first), (end, last) = self._samples[0], self._samples[-1]
            if end > start:
                self._rate = (last - first) / (end - start)

    def retry_after(self) -> int:
        """Seconds in which the requests that wait will be admitted, by the measured rate; from 1 to 60."""
        waiting = self.num_waiting
        if not waiting:
            return 1
        seconds = waiting / self._rate if self._rate else math.inf
        return math.ceil(min(max(seconds, 1.0), MOST_RETRY_SECONDS))
