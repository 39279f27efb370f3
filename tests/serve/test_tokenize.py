"""`/tokenize` and `/detokenize` over a fake tokenizer and a real one, and `/v1/models/{model_id}`."""

import threading

import httpx
import pytest
from serve_clients import client_of, run, started
from serve_fakes import FakeEngine, FakeTokenizer

from moe_runtime.config.engine import EngineConfig
from moe_runtime.serve.tokenize import MAX_CHARS
from moe_runtime.types.version import __version__


def ask(method, path, body=None, fake=None):
    async def scenario():
        async with started(fake) as engine, client_of(engine) as client:
            return await client.request(method, path, json=body)

    return run(scenario())


def test_a_prompt():
    reply = ask("POST", "/tokenize", {"prompt": "a bbb", "model": "fake-model"})
    assert reply.json() == {"count": 2, "max_model_len": 200, "tokens": [1, 3], "token_strs": None}


def test_a_chat_with_strings():
    reply = ask("POST", "/tokenize", {"messages": [{"role": "user", "content": "a bb"}], "return_token_strs": True})
    assert reply.json() == {
        "count": 3,
        "max_model_len": 200,
        "tokens": [4, 1, 2],
        "token_strs": ["xxxx", "x", "xx"],
    }


def test_the_text_of_tokens():
    assert ask("POST", "/detokenize", {"tokens": [1, 3]}).json() == {"prompt": "x xxx"}
    assert ask("POST", "/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "add_special": True}, 400, "add_special"),
        ("/tokenize", {"prompt": "x" * (MAX_CHARS + 1)}, 400, "prompt"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**31]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1] * 300_000}, 400, "tokens"),
    ],
)
def test_wrong_requests(path, body, status, param):
    reply = ask("POST", path, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)


def test_the_first_wrong_token_is_enough():
    """Work does not grow with the number of wrong elements: one error is built."""
    reply = ask("POST", "/detokenize", {"tokens": [{}] * 200_000})
    assert reply.status_code == 400 and reply.json()["error"]["message"].count("{}") == 1


def test_without_a_tokenizer():
    bare = FakeEngine(config=EngineConfig("bare", skip_tokenizer_init=True), tokenizer=None)
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        reply = ask("POST", path, body, bare)
        assert reply.status_code == 400 and "no tokenizer" in reply.json()["error"]["message"]


def test_the_event_loop_is_free_while_a_text_is_tokenised(monkeypatch):
    threads = []
    monkeypatch.setattr(FakeTokenizer, "encode", lambda self, *_: threads.append(threading.current_thread()) or [1])
    assert ask("POST", "/tokenize", {"prompt": "a"}).json()["tokens"] == [1]
    assert threads[0] is not threading.main_thread()


def test_a_real_tokenizer(real):
    text = "Grüße, 世界! <|endoftext|>"
    found = httpx.post(real.url + "/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == real.tokenizer.encode(text) and found["count"] == len(found["tokens"])
    assert len(found["token_strs"]) == found["count"] and all(isinstance(piece, str) for piece in found["token_strs"])
    assert httpx.post(real.url + "/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    messages = [{"role": "user", "content": "Hi"}]
    chat = httpx.post(real.url + "/tokenize", json={"messages": messages}).json()
    assert chat["tokens"] == real.tokenizer.apply_chat_template(messages).token_ids
    unknown = httpx.post(real.url + "/detokenize", json={"tokens": [2**31 - 1]})
    assert (unknown.status_code, unknown.json()) == (200, {"prompt": ""})


@pytest.mark.parametrize("name", ["fake-model", "org/model", "org%2Fmodel"])
def test_the_served_model(name):
    fake = FakeEngine(config=EngineConfig(name.replace("%2F", "/"), ep_size=2))
    reply = ask("GET", f"/v1/models/{name}", fake=fake)
    assert reply.status_code == 200 and reply.json()["id"] == fake.config.model
    assert reply.json() == ask("GET", "/v1/models", fake=fake).json()["data"][0] | {"created": reply.json()["created"]}


def test_another_model():
    reply = ask("GET", "/v1/models/gpt-4")
    assert reply.status_code == 404
    assert reply.json()["error"] == {
        "message": "model: 'gpt-4' is not served here; it must be 'fake-model'",
        "type": "invalid_request_error",
        "param": "model",
        "code": 404,
    }


def test_the_version():
    assert ask("GET", "/version").json() == {"version": __version__}
