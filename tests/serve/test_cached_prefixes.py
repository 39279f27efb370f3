"""Cached prefixes behind HTTP: counts in `usage`, salts of requests and keys."""

import httpx
import pytest
from serve_clients import events_of, run, started
from serve_fakes import DEADLINE, FakeEngine

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.app import create_app

HELLO = [{"role": "user", "content": "hello there"}]
ROUTES = [
    ("/generate", {"prompt": "a bb ccc"}),
    ("/v1/completions", {"prompt": "a bb ccc"}),
    ("/v1/chat/completions", {"messages": HELLO}),
]


def post(path, *bodies, fake=None, headers=None, config=None):
    """The replies to requests, one after the other."""

    async def scenario():
        async with started(fake or FakeEngine()) as engine:
            transport = httpx.ASGITransport(create_app(engine, config or ServerConfig()))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=DEADLINE) as client:
                return [await client.post(path, json={"max_tokens": 2} | body, headers=headers) for body in bodies]

    return run(scenario())


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_usage_has_the_cached_tokens(path, body):
    whole, streamed = post(path, body, {**body, "stream": True} | ({} if path == "/generate" else USAGE))
    for usage in (whole.json()["usage"], events_of(streamed.text)[-2]["usage"]):
        assert usage["prompt_tokens_details"] == {"cached_tokens": usage["prompt_tokens"] - 1}, (
            "as the fake engine says"
        )


USAGE = {"stream_options": {"include_usage": True}}


def test_each_prompt_of_several_counts_once_whatever_the_number_of_choices():
    (reply,) = post("/v1/completions", {"prompt": ["a bb ccc", "a bb"], "n": 3})
    assert reply.json()["usage"]["prompt_tokens"] == 5
    assert reply.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_salt_reaches_the_engine(path, body):
    fake = FakeEngine()
    replies = post(
        path, body, body | {"cache_salt": "s"}, body | {"cache_salt": ""}, body | {"cache_salt": 5}, fake=fake
    )
    assert [reply.status_code for reply in replies] == [200, 200, 400, 400]
    assert replies[2].json()["error"]["message"].startswith("cache_salt: ")
    assert fake.salts == [None, "salt s"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_the_key_is_the_default_salt(tmp_path, path, body):
    file = tmp_path / "keys"
    file.write_text("one\ntwo")
    config, found = ServerConfig(api_key_file=str(file)), []
    for key in ("one", "two", "one"):
        fake, headers = FakeEngine(), {"Authorization": f"Bearer {key}"}
        post(path, body, body | {"cache_salt": "s"}, fake=fake, headers=headers, config=config)
        default, asked = fake.salts
        assert default.startswith("key ") and key not in default and asked == "salt s"
        found.append(default)
    assert found[0] == found[2] != found[1]


def test_the_cache_can_be_emptied_by_the_admin():
    async def scenario():
        fake = FakeEngine()
        async with started(fake) as engine:
            found = []
            for host in ("203.0.113.9", "127.0.0.1"):
                transport = httpx.ASGITransport(create_app(engine, ServerConfig()), client=(host, 1))
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                    reply = await client.post("/reset_prefix_cache", timeout=DEADLINE)
                    found.append((reply.status_code, fake.num_resets))
            return found, reply.json()

    assert run(scenario()) == ([(403, 0), (200, 1)], {"reset": True})
