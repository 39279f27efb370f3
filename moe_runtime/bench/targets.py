"""Targets of a measurement: an engine in this process, or a running server. Both stream a request's tokens."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import ssl
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import h11

from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.engine_messages import AddRequest, Loaded
from moe_runtime.serve.request_stream import RequestFailedError, UnavailableError
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.executor import RankError

if TYPE_CHECKING:
    from moe_runtime.engine.engine import Engine

CLOSE_SECONDS = 30.0  # for the ranks to end
INTERRUPTED_SECONDS = 3.0  # the same after Ctrl-C, when the engine may be loading or inside a step
CONNECT_SECONDS = 30.0
READ_BYTES = 1 << 16
EXIT_INTERRUPTED = 130


class RequestError(RuntimeError):
    """A request failed; the message says why in one line."""


class Target(Protocol):
    """Something that continues prompts.

    Attributes:
        health: the content of `/health`: model, dtype, ranks, `max_model_len` and so on.
    """

    health: dict[str, Any]

    def stream(self, prompt: list[int], num_tokens: int) -> AsyncGenerator[int, None]:
        """Generate greedily, ignoring ends of sequence. Yields the number of new tokens each time some arrive.

        Raises:
            RequestError: the request was refused or did not finish.
        """


class EngineTarget:
    """An engine in a thread of this process, as in a server."""

    def __init__(self, engine: AsyncEngine, info: Loaded) -> None:
        self._engine = engine
        self._request_ids = map(str, itertools.count())
        self.health = info.health
        self.tokenizer = info.tokenizer

    async def stream(self, prompt: list[int], num_tokens: int) -> AsyncGenerator[int, None]:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        try:
            deltas = await self._engine.submit([AddRequest(next(self._request_ids), prompt, params)])
            try:
                async for delta in deltas:
                    yield len(delta.token_ids)
            finally:
                deltas.close()
        except (ValueError, UnavailableError, RequestFailedError) as error:
            raise RequestError(str(error)) from error


@contextlib.asynccontextmanager
async def start_engine(make_engine: Callable[[], Engine]) -> AsyncIterator[EngineTarget]:
    """Load an engine in a thread, and close it at the end.

    If the engine does not end in time, because it was interrupted while loading, the process ends at once.

    Raises:
        ValueError: a value from the user cannot be used.
        RankError: a rank failed to start.
    """
    engine = AsyncEngine(make_engine)
    engine.start()
    seconds = CLOSE_SECONDS
    try:
        try:
            info = await engine.loaded
        except UnavailableError as error:
            raise RankError(str(error)) from error
        yield EngineTarget(engine, info)
    except asyncio.CancelledError:
        seconds = INTERRUPTED_SECONDS
        raise
    finally:
        if not await engine.close(seconds):
            sys.stdout.flush()
            os._exit(EXIT_INTERRUPTED)


class ServerTarget:
    """A running server of this runtime, measured through `/generate`, with one connection per request.

    Args:
        url: the server's address, http or https. Its path is a prefix of all endpoints.
        headers: further headers of every request.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.url = url
        self._headers = dict(headers or {})
        self._parts = urlsplit(url)
        self.health: dict[str, Any] = {}

    async def connect(self) -> ServerTarget:
        """Ask the server for its health. Raises ValueError if it is not ready, or is not a server of this runtime."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                async with self._exchange("GET", "/health", b"") as reply:
                    self.health = json.loads(await reply.body())
        except TimeoutError as error:
            raise ValueError(f"url: {self.url!r} does not answer within {CONNECT_SECONDS:g} s") from error
        except (RequestError, ValueError) as error:
            raise ValueError(f"url: {self.url!r} is not a server of this runtime ({error})") from error
        if not isinstance(self.health, dict) or "status" not in self.health:
            raise ValueError(f"url: {self.url!r} is not a server of this runtime")
        if self.health["status"] != "ready":
            raise ValueError(f"url: {self.url!r} is {self.health['status']}, not ready")
        return self

    async def stream(self, prompt: list[int], num_tokens: int) -> AsyncGenerator[int, None]:
        request = {
            "prompt_token_ids": prompt,
            "max_tokens": num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
        }
        async with self._exchange("POST", "/generate", json.dumps(request).encode()) as reply:
            if reply.status != 200:
                raise RequestError(_reason(reply.status, await reply.body()))
            async for line in reply.lines():
                data = line.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                if data:
                    event = json.loads(data)
                    if "error" in event:
                        raise RequestError(event["error"]["message"])
                    yield len(event["token_ids"])
        raise RequestError("the server closed the stream before its end")

    @contextlib.asynccontextmanager
    async def _exchange(self, method: str, route: str, body: bytes) -> AsyncIterator[_Reply]:
        """Send a request over a new connection. Raises RequestError if the connection fails or breaks."""
        parts = self._parts
        secure = ssl.create_default_context() if parts.scheme == "https" else None
        connection = h11.Connection(h11.CLIENT)
        headers = [
            ("Host", parts.netloc.rpartition("@")[2]),
            ("Connection", "close"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            *self._headers.items(),
        ]
        request = h11.Request(method=method, target=parts.path.rstrip("/") + route, headers=headers)
        events = (request, h11.Data(data=body), h11.EndOfMessage())
        try:
            reader, writer = await asyncio.open_connection(
                parts.hostname, parts.port or (443 if secure else 80), ssl=secure
            )
            try:
                writer.write(b"".join(connection.send(event) or b"" for event in events))
                await writer.drain()
                reply = _Reply(connection, reader)
                await reply.start()
                yield reply
            finally:
                writer.close()
        except (OSError, h11.RemoteProtocolError) as error:
            raise RequestError(f"{type(error).__name__}: {error}") from error


class _Reply:
    """The server's reply: a status, then bytes as they arrive."""

    def __init__(self, connection: h11.Connection, reader: asyncio.StreamReader) -> None:
        self._connection = connection
        self._reader = reader
        self.status = 0

    async def start(self) -> None:
        while not isinstance(event := await self._next(), h11.Response):
            assert isinstance(event, h11.InformationalResponse)
        self.status = event.status_code

    async def body(self) -> bytes:
        return b"".join([data async for data in self._data()])

    async def lines(self) -> AsyncIterator[bytes]:
        """Lines without line ends, each as soon as it is complete."""
        rest = b""
        async for data in self._data():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line.removesuffix(b"\r")

    async def _data(self) -> AsyncIterator[bytes]:
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)

    async def _next(self) -> Any:
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            self._connection.receive_data(await self._reader.read(READ_BYTES))
        return event


def _reason(status: int, body: bytes) -> str:
    """The error message of a reply other than 200."""
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answers with status {status}"
