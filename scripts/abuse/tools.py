"""What the cases share: raw connections, a short question whose answer is known, what must hold afterwards."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from served.server import Server

SECONDS = 30.0
QUESTION: dict[str, Any] = {"prompt": "The sea is", "max_tokens": 8, "temperature": 0.0, "ignore_eos": True}


class CaseError(Exception):
    """A case has not ended as it must."""


def check(condition: bool, otherwise: str) -> None:
    if not condition:
        raise CaseError(otherwise)


def eventually(condition: Callable[[], bool], otherwise: str, seconds: float = SECONDS) -> float:
    """Wait until `condition()` holds. Returns the seconds that took."""
    start = time.monotonic()
    while not condition():
        check(time.monotonic() - start < seconds, f"{otherwise} within {seconds:g} s")
        time.sleep(0.05)
    return time.monotonic() - start


def answer(server: Server, seconds: float = SECONDS) -> str:
    """The answer to a short question."""
    request = urllib.request.Request(
        f"{server.url}/generate", json.dumps(QUESTION).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=seconds) as reply:
        text: str = json.loads(reply.read())["text"]
        return text


def connect(server: Server, receive_bytes: int | None = None) -> socket.socket:
    address = urlsplit(server.url)
    connection = socket.socket()
    if receive_bytes is not None:  # before it connects, so that its window is small
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(SECONDS)
    connection.connect((address.hostname, address.port))
    return connection


def open_stream(server: Server, max_tokens: int, receive_bytes: int | None = None) -> socket.socket:
    """A connection that has asked for a long stream, of which nothing is read."""
    body = json.dumps({**QUESTION, "max_tokens": max_tokens, "stream": True}).encode()
    connection = connect(server, receive_bytes)
    connection.sendall(head(f"Content-Length: {len(body)}") + body)
    return connection


def head(*lines: str) -> bytes:
    """The header of a POST to /generate."""
    fields = ["POST /generate HTTP/1.1", "Host: x", "Content-Type: application/json", *lines]
    return ("\r\n".join(fields) + "\r\n\r\n").encode()


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the server closes; what came before, if it breaks the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def status_of(reply: bytes) -> int:
    """The status of a reply; 0 if there is none."""
    return int(reply.split(b" ", 2)[1]) if reply.startswith(b"HTTP/1.1 ") else 0


def is_idle(server: Server) -> bool:
    """No request runs, and all pages are free."""
    metrics = server.metrics()
    running = sum(value for name, value in metrics.items() if name.startswith("moe_runtime_num_requests_"))
    used = sum(value for name, value in metrics.items() if 'state="used"' in name)
    return running == 0 and used == 0
