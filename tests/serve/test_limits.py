"""Limits on bodies and on the time of requests, in the application and on real sockets."""

import asyncio
import json
import threading
import time

import httpx
import pytest
from raw_http import RawClient, head_of
from serve_clients import ServerThread, client_of, events_of, run, started
from serve_fakes import FakeEngine, wait_until

from moe_runtime.config.server import ServerConfig

JSON_TYPE = {"Content-Type": "application/json"}
SMALL = ServerConfig(max_body_bytes=1000, max_bytes_under_way=1000)


def post(server_config, **arguments):
    async def scenario():
        async with started(FakeEngine()) as engine, client_of(engine, server_config) as client:
            return await client.post("/generate", headers=JSON_TYPE, **arguments)

    return run(scenario())


async def spaces(count):
    for _ in range(count):
        yield b" " * 100


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(chunked):
    response = post(SMALL, content=spaces(11) if chunked else b" " * 1001)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "body: is too large; it must be at most 1000 bytes"


def test_a_body_of_the_largest_size():
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert post(SMALL, content=body + b" " * (1000 - len(body))).status_code == 200


def test_bytes_under_way_are_those_of_all_requests():
    """Each request alone is small enough; both together are not, until one has ended."""
    fake = FakeEngine(allow=threading.Semaphore(0))
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    body += b" " * (600 - len(body))

    async def scenario():
        async with started(fake) as engine, client_of(engine, SMALL) as client:
            first = asyncio.create_task(client.post("/generate", content=body, headers=JSON_TYPE))
            await asyncio.to_thread(wait_until, lambda: fake.added, "the first request runs")
            refused = await client.post("/generate", content=body, headers=JSON_TYPE)
            fake.allow.release(2)
            assert (await first).status_code == 200
            return refused, await client.post("/generate", content=body, headers=JSON_TYPE)

    refused, later = run(scenario())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["type"] == "server_error"
    assert later.status_code == 200


def test_bytes_under_way_are_given_back_after_every_end():
    async def scenario():
        async with started(FakeEngine()) as engine, client_of(engine, SMALL) as client:
            bodies = client._transport.app.state.bodies
            for content in (b"{", b'{"prompt": 1}', b'{"prompt": "a", "max_tokens": 1}', b" " * 1001, spaces(11)):
                await client.post("/generate", content=content, headers=JSON_TYPE)
                assert bodies.bytes_under_way == 0

    run(scenario())


def test_a_request_that_takes_too_long():
    fake = FakeEngine(step_seconds=0.02, max_model_len=10**6)

    async def scenario():
        async with started(fake) as engine, client_of(engine, ServerConfig(request_timeout=0.3)) as client:
            whole = await client.post("/generate", json={"prompt": "a", "max_tokens": None})
            await asyncio.to_thread(wait_until, lambda: len(fake.aborted) == 1, "the request is aborted")
            stream = await client.post("/generate", json={"prompt": "a", "max_tokens": None, "stream": True})
            await asyncio.to_thread(wait_until, lambda: len(fake.aborted) == 2, "the stream's request is aborted")
            quick = await client.post("/generate", json={"prompt": "a", "max_tokens": 1})
            return whole, stream, quick

    whole, stream, quick = run(scenario())
    late = {"message": "the request has not ended within 0.3 s", "type": "server_error", "param": None, "code": 504}
    assert (whole.status_code, whole.json()["error"]) == (504, late)
    *deltas, last = events_of(stream.text)
    assert stream.status_code == 200 and last == {"error": late} and len(deltas) > 3
    assert quick.status_code == 200


def test_a_refusal_reaches_a_client_that_still_sends():
    """The client reads only after it has sent all of a body that is twice as large as is allowed."""
    config = ServerConfig(max_body_bytes=4_000_000)
    size = 8_000_000
    for head in (head_of("/generate", size), head_of("/generate", size, "Connection: close")):
        with ServerThread(FakeEngine, config) as server, RawClient(server) as client:
            client.send(head)
            client.send(b" " * size)
            status, headers, body = client.reply()
            assert (status, headers["connection"]) == (413, "close")
            assert json.loads(body)["error"]["code"] == 413
            assert client.is_closed()


def test_a_reply_to_an_unread_body_keeps_the_connection():
    with ServerThread(FakeEngine) as server, RawClient(server) as client:
        for _ in range(2):
            client.send(head_of("/no/such", 500_000))
            client.send(b" " * 500_000)
            assert client.reply()[0] == 404


def test_a_client_that_asks_before_it_sends_is_not_told_to_send_too_much():
    config = ServerConfig(max_body_bytes=1000)
    with ServerThread(FakeEngine, config) as server, RawClient(server) as client:
        client.send(head_of("/generate", 1001, "Expect: 100-continue"))
        assert client.reply()[0] == 413
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    with ServerThread(FakeEngine, config) as server, RawClient(server) as client:
        client.send(head_of("/generate", len(body), "Expect: 100-continue"))
        assert client.reply()[0] == 100
        client.send(body)
        assert client.reply()[0] == 200


def test_a_body_that_never_ends():
    config = ServerConfig(body_timeout=0.3)
    with ServerThread(FakeEngine, config) as server, RawClient(server) as client:
        started_at = time.monotonic()
        client.send(head_of("/generate", 100) + b"{")
        status, headers, body = client.reply()
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(body)["error"]["message"] == "body: has not arrived within 0.3 s"
        assert client.is_closed() and 0.3 <= time.monotonic() - started_at < 5
        assert httpx.get(server.url + "/ready").status_code == 200


def test_two_lengths_of_a_body_are_refused():
    with ServerThread(FakeEngine) as server, RawClient(server) as client:
        client.send(head_of("/generate", 5, "Transfer-Encoding: chunked") + b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
        status, _, body = client.reply()
        assert status == 400
        assert json.loads(body)["error"]["message"] == "Content-Length: not allowed beside Transfer-Encoding"
        assert client.is_closed(), "what follows is no request"


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "routing": ' + json.dumps('{"a":' * 50_000).encode() + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 400 + b"]" * 400 + b"}",
        b'{"' + b"x" * 1_000_000 + b'": 1, "prompt": "a"}',
        b'{"prompt": "a", "stop": [1, "' + b"x" * 1_000_000 + b'"]}',
        b'{"prompt": "a", "temperature": "' + b"x " * 500_000 + b'"}',
    ],
)
def test_values_that_are_deep_or_long(content):
    response = post(ServerConfig(), content=content)
    error = response.json()["error"]
    assert response.status_code in (400, 422) and len(error["message"]) <= 240
    assert error["param"] is None or len(error["param"]) <= 64


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"prompt": [' + b"[]," * (2**20 + 1) + b"[]]}"),
        ("/generate", b'{"prompt_token_ids": [' + b"1," * (2**20 + 1) + b"1]}"),
    ],
)
def test_a_body_of_very_many_values_is_not_parsed(path, body, monkeypatch):
    parsed = []
    monkeypatch.setattr(json, "loads", lambda text, **_: parsed.append(len(text)))

    async def scenario():
        async with started() as engine, client_of(engine) as client:
            return await client.post(path, content=body, headers={"Content-Type": "application/json"})

    response = run(scenario())
    monkeypatch.undo()
    assert response.status_code == 413 and "commas" in response.json()["error"]["message"]
    assert max(parsed, default=0) < 1000


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_a_body_of_many_fields_is_refused_at_once(path):
    async def scenario():
        async with started() as engine, client_of(engine) as client:
            return await client.post(path, json={"prompt": "a", **{f"f{number}": 1 for number in range(300)}})

    response = run(scenario())
    assert response.status_code == 400 and "at most 256" in response.json()["error"]["message"]
