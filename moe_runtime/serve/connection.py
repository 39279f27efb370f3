"""HTTP/1.1 connections: uvicorn's, with errors in JSON, a deadline for headers, and a limit on open connections."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys
import uuid
from http import HTTPStatus
from typing import cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.errors import error_body
from moe_runtime.serve.limits import RETRY_SECONDS

LINGER_SECONDS = 2.0  # for a refused client to take the reply; its data is read and forgotten meanwhile
MAX_LINGERING = 128  # connections above the limit that get a reply
ACCEPT_BATCH = 32  # connections that asyncio accepts at one time; a few times as many before it looks at the first
RESERVED_FILES = 4 * ACCEPT_BATCH + 128  # open files of everything but the connections that are counted
LEAST_CONNECTIONS = 16
RESPONSE_SECONDS = 2  # at the end, for complete replies and errors to reach their clients

logger = logging.getLogger(__name__)


class WebConfig(uvicorn.Config):
    """uvicorn's settings for an application of `create_app`."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            app,
            http=Connection,
            backlog=ACCEPT_BATCH,
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="error",  # a client's broken request is no warning to the operator
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=RESPONSE_SECONDS,
        )
        config: ServerConfig = app.state.server_config
        self.header_timeout = config.header_timeout
        self.max_connections = allowed_connections(config.max_connections)


def allowed_connections(wanted: int) -> int:
    """How many connections the limit of open files allows, at most `wanted`. Raises the soft limit if it must."""
    needed = wanted + MAX_LINGERING + RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = min(wanted, max(LEAST_CONNECTIONS, wanted - (needed - soft)))
    logger.warning("max_connections: %d, not %d, as the process may open %d files (ulimit -n)", allowed, wanted, soft)
    return allowed


class Connection(H11Protocol):
    """One client's connection.

    It closes if no complete header arrives in time: after it was opened, or after a part of a header. Between two
    requests, uvicorn's keep-alive timeout applies.
    """

    _header_timer: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        too_many = len(self.connections) - self._limits.max_connections
        if too_many > MAX_LINGERING:
            transport.abort()
        elif too_many > 0:
            self._refuse(503, "the server has too many connections; try again later")
        else:
            self._watch_header()

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)
            self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def close_half_open(self) -> None:
        """Close the connection if a request's header has not arrived completely."""
        if self._header_timer is not None:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Called while h11's error is handled; it says more than `msg`."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError):
            status = 400 if error.error_status_hint == 501 else error.error_status_hint  # an unknown Transfer-Encoding
            self._refuse(status, f"HTTP: {error}")
        else:
            self._refuse(400, f"HTTP: {msg}")

    @property
    def _limits(self) -> WebConfig:
        return cast(WebConfig, self.config)

    def _watch_header(self) -> None:
        """Start the deadline if a header is awaited; stop it once it is complete."""
        if self.conn.their_state is not h11.IDLE or self._is_refused:
            self._stop_header_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self._limits.header_timeout, self._header_is_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _header_is_late(self) -> None:
        unparsed, _ = self.conn.trailing_data
        if unparsed:
            self._refuse(408, f"HTTP: the header has not arrived within {self._limits.header_timeout:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Send an error, unless a reply has begun, and close once the client has had time to take it."""
        self._is_refused = True
        self._stop_header_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self.transport.write(_whole_reply(status, message))
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
        try:
            self.transport.write_eof()
        except OSError:  # the client has gone
            self.transport.abort()


def _whole_reply(status: int, message: str) -> bytes:
    body = json.dumps(error_body(status, message))
    lines = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"X-Request-Id: {uuid.uuid4().hex}",
        *([f"Retry-After: {RETRY_SECONDS}"] if status == 503 else []),
        "Connection: close",
    )
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()
