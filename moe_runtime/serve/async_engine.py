"""An asyncio interface to the engine: sends requests to the engine's thread, returns streams of deltas."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from moe_runtime.serve.admission import Admission
from moe_runtime.serve.engine_messages import (
    AbortRequest,
    Accepted,
    AddRequest,
    Answer,
    Close,
    Died,
    Event,
    Loaded,
    LoadFailed,
    Query,
    Refused,
    ResetPrefixCache,
    StartRebalance,
    Stepped,
    View,
)
from moe_runtime.serve.engine_thread import EngineThread
from moe_runtime.serve.metrics import Metrics
from moe_runtime.serve.request_metrics import RequestTimer
from moe_runtime.serve.request_stream import RequestStream, UnavailableError

if TYPE_CHECKING:
    from moe_runtime.engine.engine import Engine
    from moe_runtime.types.outputs import OutputDelta


DRAIN_POLL_SECONDS = 0.02
QUERY_SECONDS = 30.0  # an answer waits for the running step
REBALANCE_SECONDS = 600.0
RETRY_SECONDS = 5  # for clients of a server that loads or shuts down


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True)
class _Request:
    """A request that the engine has, or is about to receive."""

    stream: RequestStream
    accepted: asyncio.Future[None]
    timer: RequestTimer


class AsyncEngine:
    """Runs an engine in its own thread. All methods belong to the event loop in which `start` was called.

    Attributes:
        state, reason: whether the engine accepts requests, and if not, why.
        loaded: done once the engine accepts requests; fails with ValueError for the user's mistakes, otherwise with
            UnavailableError.
        died: done once the engine has failed, with a message that names the rank if a rank caused it.
        info: what the engine reported once it was loaded; None before.
        admission: the bound of its queue.
        metrics: Prometheus metrics of the requests and the engine.
    """

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self._make_engine = make_engine
        self.state = State.LOADING
        self.reason = "the model is loading"
        self.info: Loaded | None = None
        self.admission = Admission(0, 0)  # until the engine is loaded
        self.metrics = Metrics()
        self._requests: dict[str, _Request] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._query_ids = itertools.count()

    def start(self) -> None:
        """Start the thread that makes the engine. `loaded` holds the outcome."""
        self._loop = asyncio.get_running_loop()
        self.loaded: asyncio.Future[Loaded] = self._loop.create_future()
        self.died: asyncio.Future[str] = self._loop.create_future()
        self._thread = EngineThread(self._make_engine, self._post)
        self._thread.start()

    def require_ready(self) -> Loaded:
        """What the engine reported once it was loaded. Raises UnavailableError unless it accepts requests."""
        if self.state is not State.READY:
            raise UnavailableError(self.reason)
        assert self.info is not None
        return self.info

    def check_queue(self) -> None:
        """Raise QueueFullError if no further request may wait, UnavailableError if the engine accepts none."""
        self.require_ready()
        self.admission.check()

    def retry_after(self) -> int:
        """Seconds in which the requests that wait now will be admitted."""
        return self.admission.retry_after()

    async def submit(self, requests: Sequence[AddRequest]) -> RequestStream:
        """Send requests to the engine. Returns one stream with all their deltas, which the caller must close.

        Raises:
            ValueError: the engine refuses one of them, most often at once. None of them runs.
            QueueFullError: as many requests wait as may.
            UnavailableError: the engine accepts no requests.
        """
        rules = self.require_ready().rules
        checked: list[int] | None = None
        for request in requests:
            if request.prompt is not checked:  # choices share their prompt and differ in their seed
                rules.check(request.prompt, request.params)
                checked = request.prompt
        self.admission.check()
        stream = RequestStream([request.request_id for request in requests], self._abort)
        accepted = []
        for request in requests:
            record = _Request(stream, self._loop.create_future(), self.metrics.start_timer())
            self._requests[request.request_id] = record
            accepted.append(record.accepted)
            self.admission.sent()
            self._thread.send(request)
        try:
            await asyncio.gather(*accepted)
        except BaseException:
            stream.close()
            raise
        return stream

    async def query(self, what: View, seconds: float | None = None) -> Any:
        """Ask the engine for a view; it answers between two steps.

        Raises:
            UnavailableError: the engine is loading or dead, or has not answered within `seconds`, by default
                `QUERY_SECONDS`.
        """
        return await self._ask(lambda query_id: Query(query_id, what), seconds or QUERY_SECONDS)

    async def rebalance(self, dry_run: bool) -> dict[str, Any]:
        """Tell the engine to plan a better placement and, unless `dry_run`, move experts there. Returns once moved.

        Raises:
            ValueError: there is nothing to balance, or experts are moving already.
            UnavailableError: the engine is loading or dead, or has not ended within `REBALANCE_SECONDS`.
        """
        figures: dict[str, Any] = await self._ask(lambda query_id: StartRebalance(query_id, dry_run), REBALANCE_SECONDS)
        return figures

    async def reset_prefix_cache(self) -> None:
        """Tell the engine to forget all cached prefixes.

        Raises:
            UnavailableError: the engine is loading or dead, or has not answered within `QUERY_SECONDS`.
        """
        await self._ask(ResetPrefixCache, QUERY_SECONDS)

    async def _ask(self, make: Callable[[int], Query | StartRebalance | ResetPrefixCache], seconds: float) -> Any:
        if self.state in (State.LOADING, State.DEAD):
            raise UnavailableError(self.reason)
        query_id = next(self._query_ids)
        answer = self._answers[query_id] = self._loop.create_future()
        self._thread.send(make(query_id))
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError:
            raise UnavailableError(f"the engine has not answered within {seconds:g} s; a rank may be stuck") from None
        finally:
            self._answers.pop(query_id, None)

    async def drain(self, seconds: float) -> int:
        """Accept no more requests, and give running ones `seconds` to finish. Returns how many were aborted."""
        if self.state is not State.DEAD:
            self.state, self.reason = State.DRAINING, "the server is shutting down"
        deadline = self._loop.time() + seconds
        while self._requests and self._loop.time() < deadline:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        return self._fail_all("abort")

    async def close(self, seconds: float) -> bool:
        """End the engine and its ranks. False if its thread has not ended after `seconds`."""
        if self.state is not State.DEAD:
            self.state, self.reason = State.DEAD, "the server is shutting down"
        self._fail_all("abort")
        self._thread.send(Close())
        await asyncio.to_thread(self._thread.join, seconds)
        return not self._thread.is_alive()

    def _post(self, event: Event) -> None:
        """Called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, so the event is not needed
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Event) -> None:
        match event:
            case Stepped(deltas, stats):
                self.metrics.stats = stats
                self.admission.note(stats)
                for delta in deltas:
                    self._deliver(delta)
            case Accepted(request_id):
                self.admission.accepted()
                if request := self._requests.get(request_id):
                    _settle(request.accepted, None)
            case Refused(request_id, message):
                self.admission.refused()
                if request := self._requests.pop(request_id, None):
                    _settle(request.accepted, ValueError(message))
            case Answer(query_id, value):
                if answer := self._answers.get(query_id):
                    _settle(answer, value)
            case Loaded():
                self.info, self.metrics.stats, self.metrics.model_name = event, event.stats, event.model_name
                config = event.config
                self.admission = Admission(config.max_queue, config.max_num_seqs * config.ep_size)
                self.metrics.admission = self.admission
                if self.state is State.LOADING:
                    self.state, self.reason = State.READY, ""
                _settle(self.loaded, event)
            case LoadFailed(message, user_mistake):
                self.state, self.reason = State.DEAD, f"the model could not be loaded: {message}"
                _settle(self.loaded, ValueError(message) if user_mistake else UnavailableError(message))
            case Died(message):
                self.state, self.reason = State.DEAD, f"the engine has failed: {message}"
                self._fail_all("error")
                _settle(self.died, message)

    def _deliver(self, delta: OutputDelta) -> None:
        request = self._requests.get(delta.request_id)
        if request is None:  # aborted while the step ran
            return
        request.timer.took(delta)
        request.stream.put(delta)
        if delta.finish_reason is not None:
            del self._requests[delta.request_id]
            request.timer.finished(delta.finish_reason)

    def _abort(self, request_id: str) -> None:
        if request := self._requests.pop(request_id, None):
            request.timer.finished("abort")
            request.accepted.cancel()
            self._thread.send(AbortRequest(request_id))

    def _fail_all(self, finish_reason: str) -> int:
        """End all requests and queries with `reason`. Returns how many requests there were."""
        error = UnavailableError(self.reason)
        requests, self._requests = self._requests, {}
        for request_id, request in requests.items():
            request.timer.finished(finish_reason)
            request.stream.put(error)
            _settle(request.accepted, error)
            self._thread.send(AbortRequest(request_id))
        for answer in self._answers.values():
            _settle(answer, error)
        return len(requests)


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    """Set a future's result or exception, unless its waiter was cancelled."""
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
