"""Turns deltas into replies: whole, or as server-sent events. If a client disconnects, its requests are aborted."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.engine_messages import AddRequest
from moe_runtime.serve.errors import ApiError, error_event, event, json_response, user_error
from moe_runtime.serve.request_stream import RequestFailedError, RequestStream, UnavailableError
from moe_runtime.types.outputs import Completion

if TYPE_CHECKING:
    from moe_runtime.types.outputs import OutputDelta

T = TypeVar("T")
DONE = "[DONE]"
# In /openapi.json: one server-sent event. OpenAPI 3.2 has this key; FastAPI and tools that read streams know it too.
EVENTS = {"itemSchema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}}


def answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The argument `responses` of a route whose replies are `model`, or server-sent events."""
    description = "The answer. With `stream`, server-sent events: JSON objects, then `[DONE]`."
    return {200: {"model": model, "description": description, "content": {"text/event-stream": EVENTS}}}


class Reply(Protocol):
    """The format of one endpoint's replies."""

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The body of a reply that is not streamed. `completions` are in the order of the requests."""

    def first_events(self) -> Iterable[dict[str, Any]]:
        """Events before any token."""

    def events(self, delta: OutputDelta) -> Iterable[dict[str, Any]]:
        """Events for a delta."""

    def last_events(self) -> Iterable[dict[str, Any]]:
        """Events after the last token, before `[DONE]`."""


async def respond(
    request: Request, engine: AsyncEngine, commands: Sequence[AddRequest], reply: Reply, *, stream: bool, prompt: str
) -> Response:
    """Run requests and reply in the format of `reply`.

    Args:
        prompt: the name of the field in which the client sent the prompt, for error messages.

    Raises:
        ApiError: the engine refuses a request, or does not finish it.
        QueueFullError: as many requests wait as may.
        UnavailableError: the engine cannot run or finish the requests.
        ClientDisconnect: the client disconnected; the requests are aborted.
    """
    try:
        deltas = await until_disconnect(request.receive, engine.submit(commands))
    except ValueError as error:
        raise user_error(error, {"prompt": prompt, "prompt_token_ids": prompt}) from error
    if stream:
        return EventStream(deltas, reply)
    try:
        completions = await until_disconnect(request.receive, _collect(deltas, commands))
    except RequestFailedError as error:
        retry_after = engine.retry_after() if error.status == 429 else None
        raise ApiError(error.status, str(error), retry_after=retry_after) from error
    finally:
        deltas.close()
    return json_response(reply.whole(completions))


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects first. The body must have been read.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _collect(deltas: RequestStream, commands: Sequence[AddRequest]) -> list[Completion]:
    completions = {command.request_id: Completion() for command in commands}
    async for delta in deltas:
        completions[delta.request_id].add(delta)
    return list(completions.values())


class EventStream(Response):
    """Server-sent events of running requests. If one cannot be finished, the stream ends with an error, without
    `[DONE]`."""

    media_type = "text/event-stream"

    def __init__(self, deltas: RequestStream, reply: Reply) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._deltas = deltas
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                await until_disconnect(receive, self._send_all(send))
        finally:
            self._deltas.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def send_part(part: bytes) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": True})

        async def send_events(values: Iterable[dict[str, Any]]) -> None:
            for value in values:
                await send_part(event(json.dumps(value, allow_nan=False)))

        try:
            await send_events(self._reply.first_events())
            async for delta in self._deltas:
                await send_events(self._reply.events(delta))
            await send_events(self._reply.last_events())
        except (UnavailableError, RequestFailedError) as error:
            status = 503 if isinstance(error, UnavailableError) else error.status
            await send_part(error_event(status, str(error)))
        else:
            await send_part(event(DONE))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
