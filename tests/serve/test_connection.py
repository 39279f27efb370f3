"""Connections: what a parser refuses, headers that never end, and how many may be open."""

import json
import resource
import select
import socket
import time

import httpx
import pytest
from raw_http import RawClient, head_of
from serve_clients import ServerProcess, ServerThread
from serve_fakes import FakeEngine, wait_until

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve import connection
from moe_runtime.serve.server import bind


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /health\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400),
        (head_of("/generate", -1), 400),
        (head_of("/generate", 5, "Content-Length: 6"), 400),
        (head_of("/generate", 5).replace(b"Content-Length: 5", b"Transfer-Encoding: gzip"), 400),
        (head_of("/health", 0, "X: " + "x" * 300_000, method="GET"), 431),
        (b"GET /" + b"x" * 300_000, 431),
        (head_of("/generate", 5).replace(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"zz\r\n", 400),
    ],
)
def test_what_the_parser_refuses_has_the_body_of_errors(data, status):
    with ServerThread(FakeEngine) as server, RawClient(server) as client:
        client.send(data)
        found, headers, body = client.reply()
        assert (found, headers["content-type"], headers["connection"]) == (status, "application/json", "close")
        error = json.loads(body)["error"]
        assert error["code"] == status and error["message"].startswith("HTTP: ") and len(error["message"]) <= 240
        assert len(headers["x-request-id"]) == 32
        assert client.is_closed()
        assert httpx.get(server.url + "/ready").status_code == 200


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX: "])
def test_a_header_that_never_ends(first):
    with ServerThread(FakeEngine, ServerConfig(header_timeout=0.3)) as server, RawClient(server) as client:
        client.send(first)
        started_at = time.monotonic()
        if first:
            status, _, body = client.reply()
            assert status == 408
            assert json.loads(body)["error"]["message"] == "HTTP: the header has not arrived within 0.3 s"
        assert client.is_closed() and time.monotonic() - started_at < 5


def test_a_header_that_comes_drop_by_drop():
    """Each part comes in time, and the header does not."""
    with ServerThread(FakeEngine, ServerConfig(header_timeout=0.3)) as server, RawClient(server) as client:
        client.send(head_of("/ready", 0, method="GET"))
        assert client.reply()[0] == 200
        started_at = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - started_at < 15:
                client.send(b"G")
                time.sleep(0.05)
        assert time.monotonic() - started_at < 10


def test_a_slow_request_is_not_cut_by_the_headers_deadline():
    fake = FakeEngine(step_seconds=0.05)
    with ServerThread(lambda: fake, ServerConfig(header_timeout=0.2)) as server, httpx.Client() as client:
        for _ in range(2):
            reply = client.post(server.url + "/generate", json={"prompt": "a", "max_tokens": 20})
            assert reply.status_code == 200


def test_no_more_connections_than_are_allowed():
    with ServerThread(FakeEngine, ServerConfig(max_connections=3)) as server:
        held = [RawClient(server) for _ in range(3)]
        for client in held:
            client.send(head_of("/ready", 0, method="GET"))
            assert client.reply()[0] == 200
        with RawClient(server) as fourth:
            fourth.send(head_of("/ready", 0, method="GET"))
            status, headers, body = fourth.reply()
            assert (status, headers["retry-after"]) == (503, "1") and json.loads(body)["error"][
                "type"
            ] == "server_error"
        held[0].__exit__()
        wait_until(lambda: httpx.get(server.url + "/ready").status_code == 200, "one more is allowed")
        for client in held[1:]:
            client.__exit__()


def test_the_limit_of_open_files_bounds_connections(monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, pair: limits.append(pair))
    rest = connection.MAX_LINGERING + connection.RESERVED_FILES
    for soft, hard, wanted, allowed, raised in (
        (1024, 1024, 4096, 1024 - rest, [(1024, 1024)]),
        (1024, 10**6, 4096, 4096, [(4096 + rest, 10**6)]),
        (1024, -1, 4096, 4096, [(4096 + rest, -1)]),
        (-1, -1, 4096, 4096, []),
        (10**6, 10**6, 4096, 4096, []),
        (64, 64, 4096, connection.LEAST_CONNECTIONS, [(64, 64)]),
        (64, 64, 5, 5, [(64, 64)]),
    ):
        limits.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda what, pair=(soft, hard): pair)
        assert (connection.allowed_connections(wanted), limits) == (allowed, raised)


def test_more_clients_than_files_may_be_open():
    """The server goes on, and serves again once clients have left."""
    low = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (440, 440))"
    with ServerProcess(before=low, header_timeout=60) as server:
        url = server.url()
        address = ("127.0.0.1", int(url.split(":")[-1]))
        held = [socket.create_connection(address, 10) for _ in range(500)]
        for client in held:
            client.close()
        wait_until(lambda: httpx.get(url + "/ready").status_code == 200, "clients have left")
        server.process.terminate()
        code, _, stderr = server.wait()
    assert code == 0 and "max_connections: 56, not 4096, as the process may open 440 files" in stderr


def test_many_half_open_connections_do_not_stop_others():
    with ServerThread(FakeEngine, ServerConfig(header_timeout=1.0)) as server:
        held = [RawClient(server) for _ in range(300)]
        for client in held:
            client.send(b"GET /health HTTP/1.1\r\nHos")
        body = {"prompt": "a", "max_tokens": 3}
        assert httpx.post(server.url + "/generate", json=body, timeout=20).status_code == 200
        for client in held:
            assert client.reply()[0] == 408 and client.is_closed()
            client.__exit__()


def test_a_signal_ends_half_open_connections_at_once():
    """While a request drains, for far less time than the deadlines of headers and bodies."""
    with ServerProcess("FakeEngine(step_seconds=0.05)") as server:
        url = server.url()
        server.listener = type("Listener", (), {"getsockname": lambda self: ("127.0.0.1", int(url.split(":")[-1]))})()
        body = {"prompt": "a", "max_tokens": 150, "stream": True}
        with (
            httpx.stream("POST", url + "/generate", json=body, timeout=30) as response,
            RawClient(server) as no_header,
            RawClient(server) as no_body,
        ):
            chunks = response.iter_text()
            next(chunks)
            no_header.send(b"GET /health HTT")
            no_body.send(head_of("/generate", 10))
            time.sleep(0.2)  # the server has read both
            server.process.terminate()
            signalled_at = time.monotonic()
            assert no_header.is_closed()
            assert no_body.reply()[0] == 503 and no_body.is_closed()
            assert time.monotonic() - signalled_at < 3
            text = "".join(chunks)
        assert text.endswith("data: [DONE]\n\n")
        assert server.wait()[0] == 0


def test_a_reply_on_a_used_connection_does_not_wait_for_the_client():
    with bind("127.0.0.1", 0, 60.0) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_that_does_not_read_holds_little_and_not_for_long():
    with (
        bind("127.0.0.1", 0, 0.2) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as connection,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        num_bytes = 0
        with pytest.raises(BlockingIOError):
            while True:
                num_bytes += connection.send(bytes(4096))
        assert num_bytes < 2**20
        poll = select.poll()
        poll.register(connection, select.POLLERR)
        assert poll.poll(20_000), "the connection is open for ever"
        with pytest.raises(TimeoutError):
            connection.send(b"more")
