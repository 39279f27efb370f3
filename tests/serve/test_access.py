"""Keys, admin routes, and what is open to everybody."""

import logging
import os

import httpx
import pytest
from serve_clients import DEFAULTS, ServerThread, run, started
from serve_fakes import DEADLINE, FakeEngine

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.access import OPEN_PATHS, is_loopback
from moe_runtime.serve.app import create_app
from moe_runtime.serve.keys import KeyFile

COMPLETION = ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})
REBALANCE = ("POST", "/experts/rebalance", {"dry_run": True})


def statuses(server_config, request, headers, host="127.0.0.1"):
    """The reply to one request."""

    async def scenario():
        async with started(FakeEngine()) as engine:
            transport = httpx.ASGITransport(create_app(engine, server_config), client=(host, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
                method, path, body = request
                return await client.request(method, path, json=body, headers=headers, timeout=DEADLINE)

    return run(scenario())


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def key_files(tmp_path):
    api, admin = tmp_path / "keys", tmp_path / "admin"
    api.write_text("# of two teams\nkey-one\n\n  key-two  \n")
    admin.write_text("root\n")
    return {"api_key_file": str(api), "admin_key_file": str(admin)}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (bearer("key-one"), 200),
        ({"Authorization": "bearer  key-two"}, 200),
        (bearer("root"), 200),  # an admin's key opens all routes
        ({}, 401),
        (bearer("key"), 401),
        (bearer("key-one2"), 401),
        (bearer("# of two teams"), 401),
        (bearer(""), 401),
        ({"Authorization": "key-one"}, 401),
        ({"Authorization": "Basic key-one"}, 401),
        ({"Authorization": b"Bearer \xff\xfe"}, 401),
    ],
)
def test_a_key_is_needed(key_files, headers, status):
    reply = statuses(ServerConfig(**key_files), COMPLETION, headers)
    assert reply.status_code == status
    if status == 401:
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", 401)
        assert error["message"].startswith("Authorization: ") and "key-one" not in error["message"]
        assert reply.headers["WWW-Authenticate"] == "Bearer" and reply.headers["X-Request-Id"]


def test_every_route_but_the_open_ones_needs_a_key(key_files):
    async def scenario():
        async with started(FakeEngine()) as engine:
            app = create_app(engine, ServerConfig(**key_files))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                routes = [(path, method) for path, methods in app.openapi()["paths"].items() for method in methods]
                routes += [("/no/such", "get"), ("/health/", "get"), ("/%68ealth/x", "get")]
                found = {path: (await client.request(method, path)).status_code for path, method in routes}
                found |= {path: (await client.get(path)).status_code for path in OPEN_PATHS}
                return found

    found = run(scenario())
    assert {path for path, status in found.items() if status != 401} == OPEN_PATHS
    assert all(found[path] == 200 for path in OPEN_PATHS)


@pytest.mark.parametrize(
    ("files", "headers", "host", "status"),
    [
        (["admin_key_file"], bearer("root"), "203.0.113.9", 200),
        (["admin_key_file"], {}, "127.0.0.1", 401),
        (["admin_key_file", "api_key_file"], bearer("key-one"), "127.0.0.1", 401),
        (["admin_key_file"], bearer("root") | {"Origin": "https://evil.example"}, "127.0.0.1", 200),
        ([], {}, "127.0.0.1", 200),
        ([], {}, "::1", 200),
        ([], {}, "::ffff:127.0.0.1", 200),
        ([], {}, "203.0.113.9", 403),
        ([], {"X-Forwarded-For": "127.0.0.1"}, "203.0.113.9", 403),
        (["api_key_file"], {}, "127.0.0.1", 401),
        (["api_key_file"], bearer("key-one"), "127.0.0.1", 200),
        (["api_key_file"], bearer("key-one"), "203.0.113.9", 403),
        ([], {"Origin": "http://localhost:8000"}, "127.0.0.1", 200),
        ([], {"Origin": "https://evil.example"}, "127.0.0.1", 403),
        ([], {"Origin": "null"}, "127.0.0.1", 403),
        ([], {"Origin": "http://localhost:8001"}, "127.0.0.1", 403),
        # the name of another site that leads here: the origins are equal
        ([], {"Origin": "http://evil.example:8000", "Host": "evil.example:8000"}, "127.0.0.1", 403),
        ([], {"Origin": "http://[", "Host": "["}, "127.0.0.1", 403),
    ],
)
def test_admin_routes(key_files, files, headers, host, status):
    config = ServerConfig(**{name: key_files[name] for name in files})
    assert statuses(config, REBALANCE, headers, host).status_code == status


def test_a_proxys_client_counts_as_the_address_that_the_proxy_tells():
    with ServerThread(FakeEngine) as server:
        for forwarded, status in (("203.0.113.9", 403), ("127.0.0.1, 203.0.113.9", 403), ("127.0.0.1", 200)):
            headers = {"X-Forwarded-For": forwarded}
            reply = httpx.post(server.url + "/experts/rebalance", json={"dry_run": True}, headers=headers)
            assert reply.status_code == status


def test_without_keys_all_other_routes_are_open():
    assert statuses(DEFAULTS, COMPLETION, {"Origin": "https://evil.example"}, "203.0.113.9").status_code == 200


def test_loopback_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "localhost", "", "::ffff:192.0.2.1")))


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = tmp_path / "keys"
    file.write_text("old")
    keys = KeyFile("api_key_file", str(file))
    assert keys.accepts(b"old") and not keys.accepts(b"new")
    file.write_text("new1\nnew2")
    assert keys.accepts(b"new1") and keys.accepts(b"new2") and not keys.accepts(b"old")
    replacement = tmp_path / "other"
    replacement.write_text("abc1\nabc2")  # of the same size, with the same time
    os.utime(replacement, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    replacement.rename(file)
    assert keys.accepts(b"abc1") and not keys.accepts(b"new1")
    assert not any("abc" in record.getMessage() for record in caplog.records), "keys are not logged"


@pytest.mark.parametrize("spoil", ["remove", "empty", "folder"])
def test_a_file_of_keys_that_becomes_wrong_keeps_the_old_keys(tmp_path, caplog, spoil):
    file = tmp_path / "keys"
    file.write_text("old")
    keys = KeyFile("api_key_file", str(file))
    if spoil == "empty":
        file.write_text("# nobody\n")
    else:
        file.unlink()
        if spoil == "folder":
            file.mkdir()
    for _ in range(3):
        assert keys.accepts(b"old") and not keys.accepts(b"")
    (record,) = caplog.records  # said once
    assert record.getMessage().endswith("; the keys that were read before stay valid")
    if spoil == "empty":
        file.write_text("new")
        assert keys.accepts(b"new") and not keys.accepts(b"old")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read (No such file or directory)"), ("\n# x\n", "has no keys; it must have one key a line")],
)
def test_a_wrong_file_at_the_start(tmp_path, content, message):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError) as error:
        KeyFile("api_key_file", str(file))
    assert str(error.value) == f"api_key_file: {str(file)!r} {message}"


def users_of(server_config, *requests):
    """Who takes a turn with each request: (body, key or None); and the statuses."""
    fake = FakeEngine()

    async def scenario():
        async with started(fake) as engine:
            transport = httpx.ASGITransport(create_app(engine, server_config))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=DEADLINE) as client:
                headers = [{} if key is None else bearer(key) for _, key in requests]
                body = COMPLETION[2]
                posts = [
                    client.post(COMPLETION[1], json=body | own, headers=h)
                    for (own, _), h in zip(requests, headers, strict=True)
                ]
                return [(await post).status_code for post in posts]

    return run(scenario()), fake.users


def test_without_keys_the_field_user_says_whose_turn_a_request_takes():
    statuses, users = users_of(DEFAULTS, ({}, None), ({"user": "ann"}, "any"), ({"user": "bob"}, None), ({}, "any"))
    assert statuses == [200] * 4
    assert users[0] == users[3] == "" and len(set(users)) == 3
    assert "ann" not in "".join(users)


def test_with_keys_each_key_takes_turns(key_files):
    config = ServerConfig(**key_files)
    asked = [({}, "key-one"), ({"user": "ann"}, "key-one"), ({}, "key-two"), ({}, "root")]
    statuses, (first, second, third, admin) = users_of(config, *asked)
    assert statuses == [200] * 4
    assert first == second and len({first, third, admin}) == 3
    assert "key" not in first + third + admin and "root" not in admin


def test_only_an_admin_key_goes_before_others(key_files):
    config = ServerConfig(**key_files)
    first, last = {"priority": -1}, {"priority": 7}
    statuses, _ = users_of(config, (first, "key-one"), (last, "key-one"), (first, "root"))
    assert statuses == [400, 200, 200]
    assert users_of(DEFAULTS, (first, None))[0] == [200], "without keys nobody is told apart"
