"""What happens to the server's processes. Each case has a server of its own."""

from __future__ import annotations

import os
import signal
import socket
import time

from served.server import Server

from abuse.tools import answer, check, connect, eventually, open_stream, read_all

LIMIT = 400  # open files
RANKS = ("--ep-size", "2")


def open_files() -> str:
    """600 connections to a server that may open 400 files"""
    wrapper = ("prlimit", f"--nofile={LIMIT}:{LIMIT}", "--")
    with Server("demo", *RANKS, wrapper=wrapper) as server:
        known = answer(server)
        opened: list[socket.socket] = []
        try:
            for _ in range(600):
                opened.append(connect(server))
            time.sleep(1)
            check(server.process.poll() is None, "the server has ended")
        finally:
            for connection in opened:
                connection.close()
        seconds = eventually(lambda: _answers(server, known), "no answer after the flood")
        check("max_connections:" in server.log, "the log does not say that the limit is low")
        check(server.stop() == 0, "it did not end cleanly")
    return f"the log names the lower limit; it serves {seconds:.1f} s after they have gone"


def _answers(server: Server, known: str) -> bool:
    try:
        return answer(server) == known
    except OSError:
        return False


def sigterm() -> str:
    """SIGTERM while 32 streams of 6,000 tokens run"""
    with Server("demo", *RANKS) as server:
        streams = [open_stream(server, 6000) for _ in range(32)]
        eventually(lambda: server.metrics_of("num_requests_running") == 32, "the streams did not run")
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        replies = [read_all(stream) for stream in streams]
        code, seconds = server.wait(), time.monotonic() - start
    check(code == 0 and seconds < 25, f"exit code {code} after {seconds:.1f} s")
    check(all(b'"code": 503' in reply[-300:] for reply in replies), "a stream has ended without an error event")
    return f"the streams end with an error event; exit code 0 after {seconds:.0f} s"


def stopped_within() -> str:
    """SIGSTOP of a rank for 4 s, within the deadline of a step"""
    with Server("demo", *RANKS, "--step-timeout", "20") as server:
        known = answer(server)
        os.kill(server.ranks[1], signal.SIGSTOP)
        stream = open_stream(server, 8)
        time.sleep(4)
        check(server.get("/health") != b"", "the front does not answer")
        os.kill(server.ranks[1], signal.SIGCONT)
        reply = read_until_done(stream)
        check(b"[DONE]" in reply and answer(server) == known, "the stream has not ended")
        check(server.stop() == 0, "it did not end cleanly")
    return "the stream goes on, with the same tokens"


def stopped_past() -> str:
    """SIGSTOP of a rank past the deadline of a step (3 s)"""
    with Server("demo", *RANKS, "--step-timeout", "3") as server:
        pid = server.ranks[1]
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        reply = read_all(open_stream(server, 8))
        code, seconds = server.wait(), time.monotonic() - start
        line = last_error(server)
    check(b"rank 1" in reply, "the stream does not name the rank")
    check(code == 1 and "rank 1" in line, f"exit code {code}, {line!r}")
    return f"the stream ends with an error; exit code 1 after {seconds:.0f} s: `{line}`"


def read_until_done(stream: socket.socket) -> bytes:
    reply = b""
    while b"[DONE]" not in reply and (part := stream.recv(65536)):
        reply += part
    return reply


def last_error(server: Server) -> str:
    """The server's one line about why it has ended."""
    lines = [line for line in server.log.splitlines() if line.startswith("moe-runtime: error: ")]
    check(len(lines) == 1, f"there are {len(lines)} lines of error: {server.log[-1500:]}")
    return lines[0].removeprefix("moe-runtime: error: ")


CASES = (open_files, sigterm, stopped_within, stopped_past)
