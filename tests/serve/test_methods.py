"""HEAD, OPTIONS, CORS and request ids: what holds for every route."""

import re

import pytest
from serve_clients import DEFAULTS, client_of, run, started
from serve_fakes import FakeEngine

from moe_runtime.config.server import ServerConfig

OPEN = ServerConfig(cors_origin=["https://a.example"])


def ask(method, path, server_config=DEFAULTS, **arguments):
    async def scenario():
        async with started(FakeEngine()) as engine, client_of(engine, server_config) as client:
            return await client.request(method, path, **arguments)

    return run(scenario())


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/fake-model", "/experts/load"])
def test_head_is_get_without_a_body(path):
    head, get = ask("HEAD", path), ask("GET", path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert "content-length" in head.headers


@pytest.mark.parametrize(
    ("path", "allow"),
    [("/health", "GET, HEAD, OPTIONS"), ("/generate", "POST, OPTIONS"), ("/docs", "GET, HEAD, OPTIONS")],
)
def test_options_and_wrong_methods_name_the_allowed_ones(path, allow):
    options = ask("OPTIONS", path)
    assert (options.status_code, options.content, options.headers["allow"]) == (204, b"", allow)
    assert "access-control-allow-origin" not in options.headers
    wrong = ask("DELETE", path)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, allow)
    assert wrong.json()["error"]["message"] == "Method Not Allowed"
    if "GET" not in allow:
        head = ask("HEAD", path)
        assert (head.status_code, head.content) == (405, b"")


def test_options_of_an_unknown_path():
    assert ask("OPTIONS", "/no/such").status_code == 404


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}


def test_cors_for_the_named_origin():
    headers = PREFLIGHT | {"Origin": "https://a.example"}
    preflight = ask("OPTIONS", "/v1/chat/completions", OPEN, headers=headers)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    assert {"GET", "POST"} <= set(re.split(", *", preflight.headers["access-control-allow-methods"]))
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    reply = ask("GET", "/no/such", OPEN, headers={"Origin": "https://a.example"})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (404, "https://a.example")
    assert "X-Request-Id" in reply.headers["access-control-expose-headers"]


def test_cors_for_another_origin():
    refused = ask("OPTIONS", "/generate", OPEN, headers=PREFLIGHT | {"Origin": "https://b.example"})
    assert refused.status_code == 400 and refused.json()["error"]["message"] == "Disallowed CORS origin"
    assert "access-control-allow-origin" not in refused.headers
    reply = ask("GET", "/health", OPEN, headers={"Origin": "https://b.example"})
    assert reply.status_code == 200 and "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    ("given", "taken"),
    [("abc-1.2:3/4=5+6_", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ('a"', False), ("", False)],
)
def test_the_clients_request_id(given, taken):
    for path in ("/health", "/no/such"):
        found = ask("GET", path, headers={"X-Request-Id": given}).headers.get_list("x-request-id")
        assert len(found) == 1 and (found[0] == given if taken else re.fullmatch("[0-9a-f]{32}", found[0]))


def test_every_reply_has_a_request_id():
    replies = [
        ask("POST", "/generate", json={"prompt": "a", "max_tokens": 2, "stream": True}),
        ask("POST", "/generate", content=b"{"),
        ask("DELETE", "/health"),
        ask("OPTIONS", "/health"),
        ask("OPTIONS", "/health", OPEN, headers=PREFLIGHT | {"Origin": "https://b.example"}),
    ]
    assert [reply.status_code for reply in replies] == [200, 400, 405, 204, 400]
    assert len({reply.headers["x-request-id"] for reply in replies}) == 5


def test_a_fault_of_the_server_has_the_body_of_errors(monkeypatch):
    monkeypatch.setattr("moe_runtime.serve.health.index_page", lambda engine: 1 / 0)
    reply = ask("GET", "/")
    assert reply.status_code == 500 and reply.headers["x-request-id"]
    assert reply.json()["error"] == {
        "message": "internal error: ZeroDivisionError",
        "type": "server_error",
        "param": None,
        "code": 500,
    }


def test_the_page_of_routes_loads_nothing_from_elsewhere():
    for path in ("/docs", "/redoc"):
        page = ask("GET", path)
        assert page.headers["content-type"].startswith("text/html")
        assert "//" not in re.sub(r"^ *//.*$", "", page.text, flags=re.MULTILINE).replace("<!doctype", "")
        assert set(re.findall(r'(?:href|src)="([^"]*)"', page.text)) == {"/openapi.json"}
