"""A client's stream of deltas. It holds little, however slowly it is read: after a few, deltas are added up in one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_runtime.types.outputs import Completion

if TYPE_CHECKING:
    from moe_runtime.types.outputs import OutputDelta


MAX_UNREAD = 8  # deltas of a request
FAILURES = {"timeout": 504, "queue_timeout": 429}  # the status of a request with this finish reason; of others 500


class UnavailableError(RuntimeError):
    """The engine cannot take or finish a request: it is loading, shutting down or dead. The message says which."""


class RequestFailedError(RuntimeError):
    """The engine does not finish a request; others go on. The message says why.

    Attributes:
        status: of a reply that says so.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RequestStream:
    """Deltas of one or more requests, as steps end. Iterate until all requests have finished, then call `close`.

    If a reader is more than `MAX_UNREAD` deltas of a request late, it gets fewer and larger ones.
    """

    def __init__(self, request_ids: Iterable[str], abort: Callable[[str], None]) -> None:
        self._unfinished = set(request_ids)
        self._abort = abort
        self._unread: dict[str, deque[OutputDelta | _Sum]] = {}  # in the order in which they are read
        self._error: UnavailableError | RequestFailedError | None = None
        self._arrived = asyncio.Event()

    def put(self, item: OutputDelta | UnavailableError) -> None:
        if isinstance(item, UnavailableError):
            self._error = item
        elif item.error is not None:
            self._error = RequestFailedError(item.error, FAILURES.get(item.finish_reason or "", 500))
        else:
            waiting = self._unread.setdefault(item.request_id, deque())
            if len(waiting) < MAX_UNREAD:
                waiting.append(item)
            elif isinstance(last := waiting[-1], _Sum):
                last.add(item)
            else:
                waiting[-1] = _Sum(last, item)
        self._arrived.set()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> OutputDelta:
        """The next delta.

        Raises:
            UnavailableError: the engine cannot finish a request.
            RequestFailedError: this request is not finished.
        """
        if not self._unfinished:
            raise StopAsyncIteration
        while not self._unread:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        request_id = next(iter(self._unread))
        waiting = self._unread.pop(request_id)
        item = waiting.popleft()
        if waiting:
            self._unread[request_id] = waiting
        delta = item.delta() if isinstance(item, _Sum) else item
        if delta.finish_reason is not None:
            self._unfinished.discard(request_id)
        return delta

    def close(self) -> None:
        """Abort unfinished requests. May be called twice."""
        while self._unfinished:
            self._abort(self._unfinished.pop())


class _Sum:
    """Consecutive deltas of a request as one."""

    def __init__(self, first: OutputDelta, second: OutputDelta) -> None:
        self._first = self._last = first
        self._sum = Completion()
        self._sum.add(first)
        self.add(second)

    def add(self, delta: OutputDelta) -> None:
        self._sum.add(delta)
        self._last = delta

    def delta(self) -> OutputDelta:
        first = self._first
        return replace(
            self._last,
            text=self._sum.text,
            token_ids=self._sum.token_ids,
            logprobs=self._sum.logprobs,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=first.prompt_logprobs,
            scheduled_at=first.scheduled_at,
        )
