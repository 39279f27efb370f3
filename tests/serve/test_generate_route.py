import asyncio
import json
import math
import random
import threading
from dataclasses import MISSING, fields

import pytest
from serve_clients import client_of, events_of, run, started
from serve_fakes import MAX_MODEL_LEN, FakeEngine, wait_until

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.app import create_app
from moe_runtime.serve.generate import GenerateRequest
from moe_runtime.serve.openai.completions import CompletionRequest
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.types.structured_outputs import StructuredOutputs


def post(body, fake=None, path="/generate", **options):
    """The response to one request."""

    async def scenario():
        async with started(fake) as engine, client_of(engine) as client:
            arguments = options or {"json": body}
            return await client.post(path, **arguments)

    return run(scenario())


def test_an_answer():
    response = post({"prompt_token_ids": [5, 6, 7], "max_tokens": 4})
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id").startswith("gen-")
    assert body == {
        "text": " 8 9 10 11",
        "token_ids": [8, 9, 10, 11],
        "finish_reason": "length",
        "stop_reason": None,
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ({"prompt": "the sea is"}, [3, 3, 2]),
        ({"messages": [{"role": "user", "content": "hello there"}]}, [4, 5, 5]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}], "name": None}]}, [4, 5]),
        ({"prompt_token_ids": [1, 2], "prompt": None}, [1, 2]),
    ],
)
def test_prompts_reach_the_engine_as_tokens(prompt, token_ids):
    fake = FakeEngine()
    assert post({**prompt, "max_tokens": 1}, fake).status_code == 200
    assert [added[1] for added in fake.added] == [token_ids]


def test_all_sampling_parameters_reach_the_engine():
    given = {
        "max_tokens": None,
        "min_tokens": 0,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "logit_bias": {"5": -100, "17": 2.5},
        "seed": 2**63 - 1,
        "stop": ["a", "b"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 0,
        "prompt_logprobs": 2,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "routing": {"top_p": 0.8, "threshold": [0.1, 0.2]},
        "return_routed_experts": True,
        "priority": -2,
        "timeout": 7.5,
    }
    assert set(given) == {field.name for field in fields(SamplingParams)} - {"n", "structured_outputs"}
    fake = FakeEngine()
    response = post({"prompt_token_ids": [5], **given}, fake)
    assert (response.json()["finish_reason"], response.json()["stop_reason"]) == ("stop", 9)
    assert fake.added[0][2] == SamplingParams(**given | {"logit_bias": {5: -100, 17: 2.5}})
    post({"prompt_token_ids": [5], "max_tokens": 1, "structured_outputs": {"choice": ["a"]}}, fake)
    assert fake.added[1][2].structured_outputs == StructuredOutputs(choice=["a"])


@pytest.mark.parametrize("body", [GenerateRequest, CompletionRequest])
def test_fields_and_defaults_are_those_of_sampling_params(body):
    defaults = {name: field.default for name, field in body.model_fields.items()}
    for field in fields(SamplingParams):
        if field.name == "n" and body is GenerateRequest:
            continue
        assert field.default is not MISSING
        default = defaults[field.name]
        assert (tuple(default) if isinstance(default, list) else default) == field.default


def test_logprobs():
    fake = FakeEngine()
    body = post({"prompt_token_ids": [11, 12], "max_tokens": 2, "logprobs": 1, "prompt_logprobs": 0}, fake).json()
    assert body["logprobs"] == [
        {  # of token 13, which the fake engine finds impossible
            "13": {"logprob": -9999.0, "rank": 3, "decoded_token": " 13"},
            "114": {"logprob": -1.0, "rank": 1, "decoded_token": " 114"},
        },
        {
            "14": {"logprob": -3.0, "rank": 3, "decoded_token": " 14"},
            "115": {"logprob": -1.0, "rank": 1, "decoded_token": " 115"},
        },
    ]
    assert body["prompt_logprobs"] == [None, {"7": {"logprob": -3.0, "rank": 3, "decoded_token": " 7"}}]


def test_a_stream():
    response = post({"prompt_token_ids": [5], "max_tokens": 3, "stream": True, "logprobs": 0})
    assert response.headers["content-type"].startswith("text/event-stream")
    *deltas, done = events_of(response.text)
    assert done == "[DONE]"
    assert [(delta["text"], delta["token_ids"]) for delta in deltas] == [(" 6", [6]), (" 7", [7]), (" 8", [8])]
    assert [list(delta["logprobs"][0]) for delta in deltas] == [["6"], ["7"], ["8"]]
    assert [delta["finish_reason"] for delta in deltas] == [None, None, "length"]
    assert len({delta["id"] for delta in deltas}) == 1
    assert ["usage" in delta for delta in deltas] == [False, False, True]
    assert deltas[-1]["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert deltas[-1]["stop_reason"] is None


def test_requests_at_once(seed):
    rng = random.Random(seed)

    async def scenario():
        async with started(FakeEngine(step_seconds=0.001)) as engine, client_of(engine) as client:
            jobs = [(rng.randrange(800), rng.randint(1, 30), rng.random() < 0.5) for _ in range(16)]
            responses = await asyncio.gather(
                *(
                    client.post("/generate", json={"prompt_token_ids": [start], "max_tokens": n, "stream": stream})
                    for start, n, stream in jobs
                )
            )
            for (start, n, stream), response in zip(jobs, responses, strict=True):
                parts = events_of(response.text)[:-1] if stream else [response.json()]
                assert [token for part in parts for token in part["token_ids"]] == list(range(start + 1, start + 1 + n))

    run(scenario())


BAD = [
    ({}, 400, "prompt", "exactly one of prompt, prompt_token_ids, messages must be given, not none"),
    ({"prompt": "a", "messages": []}, 400, "prompt", "not prompt and messages"),
    ({"prompt": ""}, 400, "prompt", "empty"),
    ({"prompt": 5}, 400, "prompt", "5 is not allowed; Input should be a valid string"),
    ({"prompt": "a " * MAX_MODEL_LEN}, 400, "prompt", "max_model_len"),
    ({"prompt_token_ids": [1] * MAX_MODEL_LEN}, 400, "prompt_token_ids", "max_model_len"),
    ({"prompt_token_ids": []}, 400, "prompt_token_ids", "empty"),
    ({"prompt_token_ids": [1, "2"]}, 400, "prompt_token_ids", "[1, '2'] is not allowed; it must be a list of integers"),
    ({"prompt_token_ids": [1, 10**6]}, 400, "prompt_token_ids", "1000000"),
    ({"prompt_token_ids": [-1]}, 400, "prompt_token_ids", "-1"),
    ({"prompt_token_ids": [True]}, 400, "prompt_token_ids", "True"),
    ({"messages": "hi"}, 400, "messages", "'hi'"),
    ({"messages": [{"role": "king", "content": "hi"}]}, 400, "messages", "'king'"),
    ({"messages": [{"role": "user"}]}, 400, "messages", "it must have a content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "image_url"),
    ({"messages": [{"role": "assistant", "content": "I first"}]}, 400, "messages", "template fails"),
    ({"prompt": "a", "bogus": 1}, 400, "bogus", "no such field"),
    ({"prompt": "a", "n": 2}, 400, "n", "no such field"),
    ({"prompt": "a", "stream": "yes"}, 400, "stream", "'yes'"),
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "-1 is not allowed"),
    ({"prompt": "a", "min_tokens": 17}, 400, "min_tokens", "from 0 to 16"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "'x' is not allowed; it must be a token id"),
    ({"prompt": "a", "logit_bias": {"5": 101}}, 400, "logit_bias", "from -100 to 100"),
    ({"prompt": "a", "logit_bias": {"1000": 1}}, 400, "logit_bias", "from 0 to 999"),
    ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens", "1.5"),
    ({"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens", str(10**30)),
    ({"prompt": "a", "temperature": -1}, 400, "temperature", "-1"),
    ({"prompt": "a", "temperature": "hot"}, 400, "temperature", "'hot'"),
    ({"prompt": "a", "temperature": None}, 400, "temperature", "None"),
    ({"prompt": "a", "temperature": math.nan}, 400, "temperature", "nan"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p", "above 0"),
    ({"prompt": "a", "top_p": 1.5}, 400, "top_p", "1.5"),
    ({"prompt": "a", "top_k": -2}, 400, "top_k", "-2"),
    ({"prompt": "a", "min_p": 2}, 400, "min_p", "2"),
    ({"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty", "above 0"),
    ({"prompt": "a", "presence_penalty": 3}, 400, "presence_penalty", "3"),
    ({"prompt": "a", "frequency_penalty": -3}, 400, "frequency_penalty", "-3"),
    ({"prompt": "a", "seed": -2}, 400, "seed", "-2"),
    ({"prompt": "a", "seed": 2**63}, 400, "seed", str(2**63)),
    ({"prompt": "a", "stop": [1]}, 400, "stop", "a list of strings"),
    ({"prompt": "a", "stop": ""}, 400, "stop", "non-empty"),
    ({"prompt": "a", "stop_token_ids": [-1]}, 400, "stop_token_ids", "-1"),
    ({"prompt": "a", "logprobs": 21}, 400, "logprobs", "20"),
    ({"prompt": "a", "prompt_logprobs": -1}, 400, "prompt_logprobs", "-1"),
    ({"prompt": "a", "ignore_eos": 1}, 400, "ignore_eos", "1"),
]


@pytest.mark.parametrize(("body", "status", "param", "message"), BAD)
def test_bad_input_is_named_and_the_server_goes_on(body, status, param, message):
    async def scenario():
        fake = FakeEngine()
        async with started(fake) as engine, client_of(engine) as client:
            response = await client.post(
                "/generate", content=json.dumps(body), headers={"content-type": "application/json"}
            )
            good = await client.post("/generate", json={"prompt": "still here", "max_tokens": 1})
            assert good.status_code == 200 and not fake.running
            return response

    response = run(scenario())
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, status, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith((f"{param}: ", f"{param}."))
    assert message in error["message"] and "\n" not in error["message"]
    assert len(error["message"]) < 300


JSON_TYPE = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"content": b"{not json", "headers": JSON_TYPE}, 400, "body: not valid JSON"),
        ({"content": b"\xff\xfe\xfd", "headers": JSON_TYPE}, 400, "body"),
        ({"content": b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "headers": JSON_TYPE}, 400, "body"),
        ({"content": b"[" * 200_000, "headers": JSON_TYPE}, 400, "body"),
        ({"content": b'{"prompt": "a", "\\ud800": 1}', "headers": JSON_TYPE}, 400, "body: has a field whose name"),
        ({"content": b"[1]", "headers": JSON_TYPE}, 400, "body: must be a JSON object"),
        ({"content": b"", "headers": JSON_TYPE}, 400, "body: must be a JSON object"),
        ({"data": {"prompt": "a"}}, 400, "body: must be a JSON object, sent with Content-Type: application/json"),
    ],
)
def test_a_body_that_is_no_object(options, status, message):
    response = post(None, **options)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, status, None)
    assert message in error["message"]


def test_a_server_without_a_tokenizer():
    fake = FakeEngine(config=EngineConfig("bare", skip_tokenizer_init=True), tokenizer=None)

    async def scenario():
        async with started(fake) as engine, client_of(engine) as client:
            for field, prompt in (("prompt", "a"), ("messages", [{"role": "user", "content": "a"}])):
                response = await client.post("/generate", json={field: prompt})
                assert (response.status_code, response.json()["error"]["param"]) == (400, field)
                assert "no tokenizer" in response.json()["error"]["message"]
            return await client.post("/generate", json={"prompt_token_ids": [1], "max_tokens": 1})

    assert run(scenario()).json()["token_ids"] == [2]


@pytest.mark.parametrize("path", ["/nowhere", "/generate"])
def test_other_paths_and_methods(path):
    async def scenario():
        async with started() as engine, client_of(engine) as client:
            return await client.get(path)

    response = run(scenario())
    assert response.status_code == response.json()["error"]["code"] == (404 if path == "/nowhere" else 405)


def test_an_engine_that_fails():
    fake = FakeEngine(die_at=3)
    response = post({"prompt": "a", "max_tokens": 9}, fake)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (503, "server_error", 503)
    assert "rank 1 (pid 4242)" in error["message"]
    *events, last = events_of(post({"prompt": "a", "max_tokens": 9, "stream": True}, FakeEngine(die_at=3)).text)
    assert [event["token_ids"] for event in events] == [[2], [3]]
    assert "rank 1 (pid 4242)" in last["error"]["message"]


def test_an_error_of_ours_is_500_and_does_not_stop_the_server(monkeypatch):
    async def scenario():
        fake = FakeEngine()
        async with started(fake) as engine, client_of(engine) as client:
            monkeypatch.setattr(fake.tokenizer, "encode", lambda text: 1 // 0, raising=False)
            response = await client.post("/generate", json={"prompt": "a"})
            assert (await client.post("/generate", json={"prompt_token_ids": [1]})).status_code == 200
            return response

    response = run(scenario())
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_request_within_two_steps(stream):
    async def scenario():
        fake = FakeEngine(allow=threading.Semaphore(2))
        async with started(fake) as engine:
            left = asyncio.Event()
            body = json.dumps({"prompt_token_ids": [1], "max_tokens": None, "stream": stream}).encode()
            messages = [{"type": "http.request", "body": body, "more_body": False}]
            sent = []

            async def receive():
                if messages:
                    return messages.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            scope = {
                "type": "http",
                "http_version": "1.1",
                "method": "POST",
                "path": "/generate",
                "raw_path": b"/generate",
                "query_string": b"",
                "headers": [(b"content-type", b"application/json")],
            }
            answering = asyncio.create_task(create_app(engine, ServerConfig())(scope, receive, send))
            await asyncio.to_thread(wait_until, lambda: fake.num_steps == 2, "two steps have run")
            left.set()
            await answering
            assert fake.running and not fake.aborted  # the engine's thread is inside its third step
            fake.allow.release(2)
            await asyncio.to_thread(wait_until, lambda: fake.aborted, "the request is aborted")
            assert fake.num_steps <= 4 and not fake.running
            chunks = [message["body"] for message in sent if message["type"] == "http.response.body"]
            assert not any(b"[DONE]" in chunk for chunk in chunks)
            assert any(b'"token_ids": [2]' in chunk for chunk in chunks) == stream
            fake.allow.release(100)

    run(scenario())
