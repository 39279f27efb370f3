"""What clients can do. All cases share one server, which must answer others meanwhile and be idle afterwards."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from served.processes import pss
from served.server import Server

from abuse.tools import (
    CaseError,
    answer,
    check,
    connect,
    eventually,
    head,
    is_idle,
    open_stream,
    read_all,
    status_of,
)

HEADER_TIMEOUT, BODY_TIMEOUT, SEND_TIMEOUT, MAX_BODY_BYTES = 3, 3, 3, 2**20
FLAGS = (
    *("--ep-size", "2", "--header-timeout", str(HEADER_TIMEOUT), "--body-timeout", str(BODY_TIMEOUT)),
    *("--send-timeout", str(SEND_TIMEOUT), "--max-body-bytes", str(MAX_BODY_BYTES)),
)
MIB = 2**20


@contextmanager
def connections(make: Callable[[], socket.socket], number: int) -> Iterator[list[socket.socket]]:
    """So many connections, which are closed at the end."""
    opened = [make() for _ in range(number)]
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()


def slow_readers(server: Server, known: str) -> str:
    """32 streams of 2,000 tokens that nobody reads"""
    before = pss(server.process.pid)
    with connections(lambda: open_stream(server, 2000, receive_bytes=4096), 32):
        time.sleep(2)
        check(answer(server) == known, "another got a wrong answer")
        seconds = eventually(lambda: is_idle(server), "the streams were not ended", 90)
        growth = pss(server.process.pid) - before
    check(growth < 32 * MIB, f"the front has grown by {growth / MIB:.0f} MiB")
    return f"others are answered; the streams end after {seconds + 2:.0f} s; the front grows by {growth / MIB:.1f} MiB"


def slowloris(server: Server, known: str) -> str:
    """200 connections that send a byte of a header every half second"""
    with connections(lambda: connect(server), 200) as opened:
        start = time.monotonic()
        statuses: list[int] = []
        while time.monotonic() < start + HEADER_TIMEOUT + 2:
            for connection in opened:
                send_some(connection, b"P")
            check(answer(server) == known, "another got a wrong answer")
            time.sleep(0.5)
        statuses = [status_of(read_all(connection)) for connection in opened]
    check(set(statuses) <= {408, 400}, f"statuses {set(statuses)}")
    return f"others are answered; {statuses.count(408)} get 408 after {HEADER_TIMEOUT} s"


def header_flood(server: Server, known: str) -> str:
    """headers of 4 MiB: one field, and 100,000 fields"""
    found = []
    for header in (b"x: " + b"a" * 4 * MIB, b"x: a\r\n" * 100_000):
        with connect(server) as connection:
            send_some(connection, b"GET / HTTP/1.1\r\nHost: x\r\n" + header)
            found.append(status_of(read_all(connection)))
    check(set(found) <= {431, 400}, f"statuses {found}")
    return "431, the connection is closed"


def endless_bodies(server: Server, known: str) -> str:
    """bodies without an end: as fast as possible, and a byte every half second"""
    with connect(server) as fast, connect(server) as slow:
        for connection in (fast, slow):
            connection.sendall(head("Transfer-Encoding: chunked"))
        part = b"%x\r\n%s\r\n" % (65536, b" " * 65536)
        for _ in range(2 * MAX_BODY_BYTES // 65536):
            send_some(fast, part)
        start = time.monotonic()
        while time.monotonic() < start + BODY_TIMEOUT + 1:
            send_some(slow, b"1\r\n \r\n")
            check(answer(server) == known, "another got a wrong answer")
            time.sleep(0.5)
        found = [status_of(read_all(connection)) for connection in (fast, slow)]
    check(found == [413, 408], f"statuses {found}")
    return f"413 above the limit, 408 after {BODY_TIMEOUT} s"


def hang_ups(server: Server, known: str) -> str:
    """200 streams whose clients hang up at the same time"""
    with connections(lambda: open_stream(server, 500), 200) as opened:
        eventually(lambda: server.metrics_of("num_requests_running") >= 100, "the streams did not run", 60)
        for connection in opened:
            connection.close()
        seconds = eventually(lambda: is_idle(server), "their pages are held", 60)
    check(answer(server) == known, "another got a wrong answer")
    return f"all requests are aborted and all pages free after {seconds:.1f} s"


def send_some(connection: socket.socket, data: bytes) -> None:
    """Send, unless the server has closed."""
    try:
        connection.sendall(data)
    except ConnectionError:
        pass
    except TimeoutError as error:
        raise CaseError("the server neither reads nor closes") from error


CASES = (slow_readers, slowloris, header_flood, endless_bodies, hang_ups)
