"""The times by which requests must end, or leave the queue. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from moe_runtime.engine.keyed_heap import KeyedHeap
from moe_runtime.engine.request import Request

TIMEOUT, QUEUE_TIMEOUT = "timeout", "queue_timeout"  # finish reasons


class Deadlines:
    """The deadlines of all requests.

    Args:
        queue_timeout: seconds within which a rank must begin a request; None sets no limit.
    """

    def __init__(self, queue_timeout: float | None) -> None:
        self._queue_timeout = queue_timeout
        self._requests: dict[int, Request] = {}
        self._times: KeyedHeap[int] = KeyedHeap()

    def add(self, request: Request) -> None:
        """Watch a request that has just arrived."""
        self._watch(request, self._queue_timeout)

    def remove(self, request: Request) -> None:
        """A request has ended."""
        if self._requests.pop(request.seq_id, None) is not None:
            self._times.remove(request.seq_id)

    def late(self, now: float) -> Iterator[tuple[Request, str, str]]:
        """The requests whose time has passed, each with its finish reason and a message. They are watched no more."""
        while (seq_id := self._times.first()) is not None and self._times.key(seq_id) <= now:
            request = self._requests[seq_id]
            self.remove(request)
            timeout = request.params.timeout
            if timeout is not None and request.arrived_at + timeout <= now:
                yield request, TIMEOUT, f"timeout: the request has not ended within {timeout:g} s"
            elif request.scheduled_at is None:
                yield request, QUEUE_TIMEOUT, f"the request has waited {self._queue_timeout:g} s; try again later"
            else:
                self._watch(request, None)

    def _watch(self, request: Request, queue_timeout: float | None) -> None:
        seconds = [each for each in (queue_timeout, request.params.timeout) if each is not None]
        if seconds:
            self._requests[request.seq_id] = request
            self._times.set(request.seq_id, request.arrived_at + min(seconds))
