"""OpenAI's own client against a server on a socket."""

import httpx
import openai
import pytest
from serve_clients import ServerThread, events_of
from serve_fakes import DEADLINE, FakeEngine

from moe_runtime.config.engine import EngineConfig

HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]  # [6, 2, 5, 4, 5]


@pytest.fixture(scope="module")
def fake():
    return FakeEngine(config=EngineConfig("somewhere/fake", ep_size=2, served_model_name="fake"))


@pytest.fixture(scope="module")
def url(fake):
    with ServerThread(lambda: fake) as server:
        yield server.url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=DEADLINE) as client:
        yield client


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("fake", "model", "moe_runtime")


def test_a_completion(client):
    completion = client.completions.create(model="fake", prompt="the sea is", max_tokens=3)
    (choice,) = completion.choices
    assert (completion.object, completion.model) == ("text_completion", "fake")
    assert completion.id.startswith("cmpl-")
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, " 3 4 5", "length", None)
    assert completion.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ([7, 8], [" 9 10"]),
        (["a", "bb ccc"], [" 2 3", " 4 5"]),
        ([[1, 2], [30], [40]], [" 3 4", " 31 32", " 41 42"]),
    ],
)
def test_forms_of_prompts(client, prompt, texts):
    completion = client.completions.create(model="fake", prompt=prompt, max_tokens=2)
    assert [choice.text for choice in completion.choices] == texts
    assert [choice.index for choice in completion.choices] == list(range(len(texts)))
    assert completion.usage.completion_tokens == 2 * len(texts)


def test_logprobs_of_a_completion(client):
    completion = client.completions.create(model="fake", prompt=[8], max_tokens=2, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs.tokens == [" 9", " 10"]
    assert logprobs.token_logprobs == [-3.0, -3.0]
    assert logprobs.top_logprobs == [{" 9": -3, " 110": -1, " 111": -2}, {" 10": -3, " 111": -1, " 112": -2}]
    assert logprobs.text_offset == [0, 2]


def test_a_stream_of_completions(client):
    chunks = list(
        client.completions.create(
            model="fake",
            prompt=[[1], [20]],
            max_tokens=3,
            logprobs=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *chunks, last = chunks
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (2, 6, 8)
    for index, first in enumerate((2, 21)):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        texts = [f" {first + n}" for n in range(3)]
        assert [choice.text for choice in choices] == texts
        assert [choice.finish_reason for choice in choices] == [None, None, "length"]
        assert [choice.logprobs.tokens for choice in choices] == [[text] for text in texts]
        assert [choice.logprobs.text_offset for choice in choices] == [[n * len(texts[0])] for n in range(3)]
    assert {chunk.usage for chunk in chunks} == {None}
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_a_chat(client, fake):
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_completion_tokens=2, seed=4)
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("chat.completion", "fake")
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", " 6 7", "length")
    assert choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 2)
    assert fake.added[-1][1] == [6, 2, 5, 4, 5] and fake.added[-1][2].seed == 4


def test_logprobs_of_a_chat(client):
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=1, logprobs=True, top_logprobs=2)
    (entry,) = answer.choices[0].logprobs.content
    assert (entry.token, entry.logprob, bytes(entry.bytes)) == (" 6", -3.0, b" 6")
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [(" 107", -1.0), (" 108", -2.0)]
    plain = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=1, logprobs=True)
    assert plain.choices[0].logprobs.content[0].top_logprobs == []


def test_a_stream_of_a_chat(client):
    with client.chat.completions.create(
        model="fake",
        messages=HELLO,
        max_tokens=3,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        first, *chunks, last = list(stream)
    assert first.object == "chat.completion.chunk"
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in chunks] == [" 6", " 7", " 8"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "length"]
    assert [chunk.choices[0].logprobs.content[0].token for chunk in chunks] == [" 6", " 7", " 8"]
    assert last.choices == [] and last.usage.total_tokens == 8


def test_without_include_usage_no_chunk_has_any(url):
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    *chunks, done = events_of(httpx.post(url + "/v1/chat/completions", json=body).text)
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks)


def test_default_limits(client, fake):
    client.completions.create(model="fake", prompt="a")
    assert fake.added[-1][2].max_tokens == 16
    client.chat.completions.create(model="fake", messages=HELLO)
    assert fake.added[-1][2].max_tokens is None


def test_parameters_beyond_openai_and_neutral_ones(client, fake):
    client.completions.create(
        model="fake",
        prompt="a",
        n=1,
        best_of=1,
        echo=False,
        logit_bias={},
        user="me",
        suffix=None,
        temperature=0,
        stop=["x"],
        extra_body={"top_k": 3, "ignore_eos": True, "seed": None, "repetition_penalty": 1.25},
    )
    params = fake.added[-1][2]
    assert (params.top_k, params.ignore_eos, params.seed, params.repetition_penalty) == (3, True, None, 1.25)
    assert (params.temperature, params.stop) == (0.0, ("x",))
    client.chat.completions.create(
        model="fake", messages=HELLO, tools=[], tool_choice="none", response_format={"type": "text"}, n=1, max_tokens=1
    )


CHAT = {"messages": HELLO}
TOOL = {"type": "function", "function": {"name": "f"}}
BAD = [
    ("completions", {}, 400, "prompt", "missing"),
    ("completions", {"prompt": None}, 400, "prompt", "missing"),
    ("completions", {"prompt": []}, 400, "prompt", "empty"),
    ("completions", {"prompt": [[1], []]}, 400, "prompt", "empty"),
    ("completions", {"prompt": {}}, 400, "prompt", "not allowed"),
    ("completions", {"prompt": ["a", 5]}, 400, "prompt", "it must be a text, token ids, or a list of either"),
    ("completions", {"prompt": [1, True]}, 400, "prompt", "not allowed"),
    ("completions", {"prompt": "a", "n": 0}, 400, "n", "0 is not allowed; it must be an integer from 1"),
    ("completions", {"prompt": "a", "n": 129}, 400, "n", "at most 128 (max_choices)"),
    ("completions", {"prompt": "a", "best_of": 2}, 400, "best_of", "2 is not supported; it must be left out, or n (1)"),
    ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "'b' is not supported; it must be left out or ''"),
    ("completions", {"prompt": "a", "logit_bias": {"5": "1"}}, 400, "logit_bias", "'1' is not allowed"),
    ("completions", {"prompt": ["a"] * 1025}, 400, "prompt", "1025 prompts are too many; it must be at most 1024"),
    ("completions", {"prompt": ["a"] * 9, "n": 128}, 400, "n", "128 choices of 9 prompts are too many"),
    ("completions", {"prompt": "a", "stop": ["x"] * 65}, 400, "stop", "at most 64 (max_stop_strings)"),
    ("completions", {"prompt": "a", "stop": "x" * 1025}, 400, "stop", "at most 1024 (max_stop_chars)"),
    ("completions", {"prompt": "a", "guided_json": {}}, 400, "guided_json", "is not supported"),
    ("completions", {"prompt": "a", "logprobs": 99}, 400, "logprobs", "99"),
    ("completions", {"prompt": "a", "model": "other"}, 404, "model", "'other' is not served here"),
    ("completions", {"prompt": "a", "stream_options": 5}, 400, "stream_options", "5 is not allowed"),
    ("chat/completions", {}, 400, "messages", "missing"),
    ("chat/completions", {"messages": []}, 400, "messages", "at least one"),
    ("chat/completions", {**CHAT, "top_logprobs": 21}, 400, "top_logprobs", "21"),
    ("chat/completions", {**CHAT, "logprobs": 1}, 400, "logprobs", "1 is not allowed"),
    ("chat/completions", {**CHAT, "max_completion_tokens": 0}, 400, "max_completion_tokens", "0 is not allowed"),
    ("chat/completions", {**CHAT, "max_tokens": 0}, 400, "max_tokens", "0 is not allowed"),
    ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs", "logprobs must be true"),
    ("chat/completions", {**CHAT, "n": 129}, 400, "n", "max_choices"),
    ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools", "tools.0.function: missing"),
    ("chat/completions", {**CHAT, "tools": [{"type": "custom"}]}, 400, "tools", "'custom' is not allowed"),
    ("chat/completions", {**CHAT, "tools": [TOOL] * 129}, 400, "tools", "at most 128 (max_tools)"),
    ("chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice", "tools must have a tool that fits"),
    ("chat/completions", {**CHAT, "tool_choice": {"type": "function"}}, 400, "tool_choice", "none, auto, required or"),
    ("chat/completions", {**CHAT, "echo": True}, 400, "echo", "True is not allowed"),
    ("chat/completions", {**CHAT, "modalities": ["audio"]}, 400, "modalities", "is not supported"),
    ("chat/completions", {**CHAT, "functions": [{}]}, 400, "functions", "is not supported"),
    ("chat/completions", {**CHAT, "response_format": {"type": "yaml"}}, 400, "response_format", "json_object"),
    ("chat/completions", {**CHAT, "temperature": -0.1}, 400, "temperature", "-0.1"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a " * 300}]}, 400, "messages", "max_model_len"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "message"), BAD)
def test_bad_input(client, path, body, status, param, message):
    with pytest.raises(openai.APIStatusError) as caught:
        client.post(f"/{path}", body=body, cast_to=object)
    error = caught.value
    assert (error.status_code, error.param, error.type) == (status, param, "invalid_request_error")
    assert error.body["code"] == status
    assert error.body["message"].startswith(param) and message in error.body["message"]
    assert "\n" not in error.body["message"]


def test_an_engine_that_fails_in_a_stream():
    with ServerThread(lambda: FakeEngine(die_at=4)) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model="fake-model", messages=HELLO, stream=True)
            with pytest.raises(openai.APIError, match="rank 1"):
                _ = list(stream)
        assert server.wait() == (1, True)
