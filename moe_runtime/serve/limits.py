"""Limits on what a request may cost: bytes of its body, time for its body, time for all of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.errors import error_event, error_response

MAX_COMMAS = 2**20  # so of values in a body: reading them as JSON takes about a second
MAX_DRAINED_BYTES = 64 * 2**20  # of a body that is not wanted
LAST_EVENT_SECONDS = 1.0  # for a client to take the error that ends its stream
RETRY_SECONDS = "1"
CLOSE = {"Connection": "close"}


class Bodies:
    """The bodies of all requests: their bytes in memory, and those that are still arriving."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.bytes_under_way = 0
        self._arriving: set[asyncio.Timeout] = set()
        self._ended = False

    def end(self) -> None:
        """Wait no longer for any body: the server ends."""
        self._ended = True
        for timeout in self._arriving:
            if not timeout.expired():
                timeout.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def waiting(self, deadline: float) -> AsyncIterator[None]:
        """Wait for a part of a body. Raises TimeoutError at `deadline`, or when the server ends."""
        async with asyncio.timeout_at(0.0 if self._ended else deadline) as timeout:
            self._arriving.add(timeout)
            try:
                yield
            finally:
                self._arriving.discard(timeout)

    def late(self) -> HTTPException:
        """The error of a request whose body has not arrived in time."""
        if self._ended:
            return HTTPException(503, "the server is shutting down", CLOSE)
        return HTTPException(408, f"body: has not arrived within {self.config.body_timeout:g} s", CLOSE)


class BodyLimit:
    """Refuses bodies that are too large, too slow or too many, before they fill memory."""

    def __init__(self, app: ASGIApp, bodies: Bodies) -> None:
        self._app = app
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(self._bodies, scope, receive, send)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        app = self._app
        if b"content-length" in headers and b"transfer-encoding" in headers:
            app = error_response(400, "Content-Length: not allowed beside Transfer-Encoding", headers=CLOSE)
        elif length.isdigit() and int(length) > self._bodies.config.max_body_bytes:
            app = error_response(413, body.too_large, headers=CLOSE)
        try:
            await app(scope, body.receive, body.send)
        finally:
            body.release()


class _Body:
    """The body of one request, as it arrives. A reply to a body that was not read ends once it is."""

    def __init__(self, bodies: Bodies, scope: Scope, receive: Receive, send: Send) -> None:
        self._bodies = bodies
        self._receive = receive
        self._send = send
        self._deadline = asyncio.get_running_loop().time() + bodies.config.body_timeout
        self._num_bytes = self._num_commas = 0
        self._complete = False
        self._closes = False
        # Such a client sends its body when told to, which the first `receive` does.
        self._is_held_back = b"100-continue" in dict(scope["headers"]).get(b"expect", b"").lower()
        self.too_large = f"body: is too large; it must be at most {bodies.config.max_body_bytes} bytes"

    async def receive(self) -> Message:
        """The next part. Raises HTTPException if the body is too large or too slow."""
        if self._complete:
            return await self._receive()
        self._is_held_back = False
        try:
            async with self._bodies.waiting(self._deadline):
                message = await self._next()
        except TimeoutError:
            raise self._bodies.late() from None
        size = len(message.get("body", b""))
        self._num_commas += message.get("body", b"").count(b",")
        if self._num_commas > MAX_COMMAS:
            raise HTTPException(413, f"body: has too many values; it must have at most {MAX_COMMAS} commas", CLOSE)
        if self._num_bytes + size > self._bodies.config.max_body_bytes:
            raise HTTPException(413, self.too_large, CLOSE)
        if self._bodies.bytes_under_way + size > self._bodies.config.max_bytes_under_way:
            too_many = "body: the server has too many bodies in memory; try again later"
            raise HTTPException(503, too_many, {"Retry-After": RETRY_SECONDS, **CLOSE})
        self._num_bytes += size
        self._bodies.bytes_under_way += size
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the reply. Before its end, read what the client still sends, so that it finds the reply."""
        if message["type"] == "http.response.start":
            self._closes = (b"connection", b"close") in [(name.lower(), value) for name, value in message["headers"]]
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not is_last or self._complete or self._is_held_back:
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        if await self._drain() or self._closes:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        # A reply without an end makes the web server close the connection.

    async def _drain(self) -> bool:
        """Read and forget the rest of the body. Returns whether its end came, within limits of time and bytes."""
        num_bytes = 0
        try:
            async with self._bodies.waiting(self._deadline):
                while not self._complete and num_bytes < MAX_DRAINED_BYTES:
                    num_bytes += len((await self._next()).get("body", b""))
        except TimeoutError:
            return False
        return self._complete

    async def _next(self) -> Message:
        message = await self._receive()
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    def release(self) -> None:
        """The request has ended."""
        self._bodies.bytes_under_way -= self._num_bytes


class RequestTimeout:
    """Ends requests that take longer than `seconds`: with an error, or an error event in a stream that has begun."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None

        async def watched_send(message: Message) -> None:
            nonlocal start
            start = start or message
            await send(message)

        late = f"the request has not ended within {self._seconds:g} s"
        try:
            async with asyncio.timeout(self._seconds) as deadline:
                await self._app(scope, receive, watched_send)
        except TimeoutError:
            if not deadline.expired():
                raise
            if start is None:
                await error_response(504, late, headers=CLOSE)(scope, receive, send)
            elif _is_event_stream(start):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_EVENT_SECONDS):
                        await send({"type": "http.response.body", "body": error_event(504, late), "more_body": False})


def _is_event_stream(start: Message) -> bool:
    headers: dict[bytes, bytes] = dict(start["headers"])
    return headers.get(b"content-type", b"").startswith(b"text/event-stream")
