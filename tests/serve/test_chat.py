"""`/v1/chat/completions`: messages, tool calls and reasoning, over an engine that writes a script."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_server import RealServer
from serve_clients import ServerProcess, ServerThread, client_of, events_of, run, started
from serve_fakes import DEADLINE, FakeEngine

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.engine_messages import AddRequest
from moe_runtime.serve.openai.answers import ChatAnswer
from moe_runtime.serve.openai.chat import answer_parser
from moe_runtime.serve.openai.chat_reply import ChatReply
from moe_runtime.serve.openai.chat_request import ChatCompletionRequest
from moe_runtime.serve.rendering import Chat
from moe_runtime.text.formats.registry import choose_format
from moe_runtime.types.outputs import Completion, OutputDelta
from moe_runtime.types.sampling_params import SamplingParams

HERMES = ServerConfig(tool_call_parser="hermes", reasoning_parser="qwen3")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HELLO = [{"role": "user", "content": "hello"}]
ANSWER = (
    "<think>\nWhich city? Paris.\n</think>\n\nI will look.\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
    '{"name": "get_weather", "arguments": {"city": "Zürich 🦀"}}\n</tool_call>'
)


def scripted(text: str, size: int = 3) -> FakeEngine:
    return FakeEngine(script=[text[i : i + size] for i in range(0, len(text), size)])


def post(engine: FakeEngine, config: ServerConfig = HERMES, **body: Any) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with started(engine) as running, client_of(running, config) as client:
            return await client.post("/v1/chat/completions", json={"messages": HELLO, **body})

    response: httpx.Response = run(scenario())
    if response.status_code == 200 and not body.get("stream"):
        ChatAnswer.model_validate(response.json())
    return response


@pytest.fixture
def real_text() -> Any:
    """Answers with a text, of which the engine finds the stop strings."""

    def answer(text: str, stop: list[str] | None = None, **body: Any) -> dict[str, Any]:
        cut = min([text.find(each) for each in stop or () if each in text], default=len(text))
        response = post(scripted(text[:cut]), **body)
        if body.get("stream"):
            return gathered(events_of(response.text)[:-1])
        return plain(response.json()["choices"][0])

    return answer


def gathered(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a stream, by OpenAI's rules."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = None
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", ()):
                calls = message["tool_calls"]
                if "id" in call:
                    assert call["index"] == len(calls) and call["type"] == "function"
                    calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return {**message, "finish_reason": reason}


def plain(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a whole reply in the form of `gathered`."""
    message = choice["message"]
    calls = [{"id": call["id"], **call["function"]} for call in message.get("tool_calls", ())]
    return {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content", ""),
        "tool_calls": calls,
        "finish_reason": choice["finish_reason"],
    }


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{key: value for key, value in call.items() if key != "id"} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def test_calls_and_reasoning_whole_and_streamed() -> None:
    (choice,) = post(scripted(ANSWER), tools=[WEATHER]).json()["choices"]
    message = plain(choice)
    assert message["reasoning_content"].strip() == "Which city? Paris."
    assert message["content"].strip() == "I will look."
    assert [json.loads(call["arguments"]) for call in message["tool_calls"]] == [
        {"city": "Paris"},
        {"city": "Zürich 🦀"},
    ]
    assert message["finish_reason"] == "tool_calls"
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    *events, done = events_of(post(scripted(ANSWER), tools=[WEATHER], stream=True).text)
    assert done == "[DONE]"
    assert without_ids(gathered(events)) == without_ids(message)
    assert "<" not in "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def test_one_call_at_a_time_and_no_reasoning_if_not_wanted() -> None:
    body = {"tools": [WEATHER], "parallel_tool_calls": False, "include_reasoning": False}
    for streamed in (False, True):
        response = post(scripted(ANSWER), stream=streamed, **body)
        message = gathered(events_of(response.text)[:-1]) if streamed else plain(response.json()["choices"][0])
        assert [call["name"] for call in message["tool_calls"]] == ["get_weather"]
        assert (message["reasoning_content"], message["finish_reason"]) == ("", "tool_calls")


@pytest.mark.parametrize(
    ("options", "reason"), [({"stop": ["Zü"]}, "stop"), ({}, "tool_calls"), ({"max_tokens": 30}, "length")]
)
def test_a_call_that_is_cut_off_is_no_reason(real_text: Any, options: dict[str, Any], reason: str) -> None:
    for streamed in (False, True):
        message = real_text(ANSWER, tools=[WEATHER], stream=streamed, **options)
        assert message["finish_reason"] == reason
        complete = [call for call in message["tool_calls"] if call["arguments"].endswith("}")]
        assert reason == "tool_calls" or len(complete) < 2


def test_tools_that_may_not_be_used_are_not_shown_and_no_markup_is_content() -> None:
    engine = scripted(ANSWER)
    (choice,) = post(engine, tools=[WEATHER], tool_choice="none").json()["choices"]
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"
    assert choice["message"]["content"].strip() == "I will look."
    assert engine.tokenizer.rendered[-1]["tools"] == []
    post(engine, tools=[WEATHER])
    assert engine.tokenizer.rendered[-1]["tools"] == [WEATHER]


def test_a_history_with_calls_is_rendered() -> None:
    """The shapes that agents send back: no content beside calls, ids, refusals, fields of the answer."""
    history = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "weather?", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "audio": None,
            "id": "chatcmpl-1",
            "reasoning_content": "Paris",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "21", "cache_control": {}}]},
        {"role": "assistant", "content": "", "function_call": {"name": "get_weather", "arguments": "{}"}},
        {"role": "function", "name": "get_weather", "content": "22"},
    ]
    engine = scripted("ok")
    assert post(engine, messages=history, tools=[WEATHER]).status_code == 200
    shown = engine.tokenizer.rendered[-1]["messages"]
    assert [message["role"] for message in shown] == ["developer", "user", "assistant", "tool", "assistant", "tool"]
    assert [message["content"] for message in shown] == ["be\nbrief", "weather?", None, "21", "", "22"]
    assert shown[2]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert shown[2]["reasoning_content"] == "Paris" and shown[3]["tool_call_id"] == "call_1"
    assert shown[4]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": "{}"}


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"role": "user"}, "messages.0"),
        ({"role": "tool", "content": None}, "messages.0"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "type": "custom"}]}, "messages"),
        ({"role": "assistant", "audio": {"id": "x"}}, "messages"),
        ("hello", "messages.0"),
    ],
)
def test_a_wrong_message_is_named(message: Any, where: str) -> None:
    response = post(scripted("ok"), messages=[message])
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert error["message"].startswith(f"{where}: ") and "\n" not in error["message"]


def test_template_options_reach_the_template() -> None:
    engine = scripted("ok")
    options = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    assert post(engine, **options).status_code == 200
    rendered = engine.tokenizer.rendered[-1]
    assert rendered["template_kwargs"] == {"reasoning_effort": "low", "enable_thinking": False}
    assert (rendered["add_generation_prompt"], rendered["continue_final_message"]) == (True, False)
    post(engine, messages=[*HELLO, {"role": "assistant", "content": "well"}], continue_final_message=True)
    rendered = engine.tokenizer.rendered[-1]
    assert (rendered["add_generation_prompt"], rendered["continue_final_message"]) == (False, True)


def test_a_continued_thought_is_reasoning() -> None:
    history = [*HELLO, {"role": "assistant", "content": "<think>\nLet me"}]
    (choice,) = post(scripted(" see.\n</think>\n\nParis."), messages=history, continue_final_message=True).json()[
        "choices"
    ]
    assert plain(choice)["reasoning_content"].strip() == "see." and plain(choice)["content"].strip() == "Paris."


def test_a_request_beyond_the_models_defaults() -> None:
    """Fields that a request leaves out have the values of the model's `generation_config.json`."""
    engine = scripted("ok")
    engine.model_config.default_sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    post(engine, top_p=0.5)
    params = engine.added[-1][2]
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.5)


def test_choices_of_a_chat(real: RealServer) -> None:
    options = {"messages": HELLO, "max_tokens": 5, "temperature": 1, "logprobs": True, "ignore_eos": True}
    url = real.url + "/v1/chat/completions"
    answer = httpx.post(url, json={**options, "n": 2, "seed": 3}).json()
    for index, choice in enumerate(answer["choices"]):
        alone = httpx.post(url, json={**options, "seed": 3 + index}).json()
        assert alone["choices"][0]["message"] == choice["message"]
        values = [[entry["logprob"] for entry in each["logprobs"]["content"]] for each in (alone["choices"][0], choice)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert answer["usage"]["completion_tokens"] == 10
    *events, _ = events_of(httpx.post(url, json={**options, "n": 2, "seed": 3, "stream": True}).text)
    roles = [choice["index"] for event in events for choice in event["choices"] if "role" in choice["delta"]]
    assert roles == [0, 1]
    for index, choice in enumerate(answer["choices"]):
        parts = [part for event in events for part in event["choices"] if part["index"] == index]
        assert "".join(part["delta"].get("content") or "" for part in parts) == choice["message"]["content"]
        tokens = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert tokens == choice["logprobs"]["content"]


def test_bytes_of_tokens_are_those_of_the_text(real: RealServer) -> None:
    body = {"messages": HELLO, "max_tokens": 30, "temperature": 2.0, "seed": 5, "logprobs": True, "top_logprobs": 2}
    for seed in range(5):
        (choice,) = httpx.post(real.url + "/v1/chat/completions", json={**body, "seed": seed}).json()["choices"]
        data = bytes(byte for token in choice["logprobs"]["content"] for byte in token["bytes"])
        assert data.decode(errors="replace") == choice["message"]["content"]


def test_the_official_client_runs_a_tool_loop() -> None:
    engine = scripted(ANSWER)
    with ServerThread(lambda: engine, HERMES) as server:
        options: dict[str, Any] = {"base_url": server.url + "/v1", "api_key": "none", "timeout": DEADLINE}
        with openai.OpenAI(**options, max_retries=0) as client:
            messages: list[Any] = [{"role": "user", "content": "weather?"}]
            first = client.chat.completions.create(model="fake-model", messages=messages, tools=[WEATHER])
            calls = first.choices[0].message.tool_calls or []
            messages.append(first.choices[0].message)
            messages += [{"role": "tool", "tool_call_id": call.id, "content": "21"} for call in calls]
            engine.script = ["It is ", "warm."]
            second = client.chat.completions.create(model="fake-model", messages=messages, tools=[WEATHER])
            assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("It is warm.", "stop")
            with client.chat.completions.stream(model="fake-model", messages=messages, tools=[WEATHER]) as stream:
                assert stream.get_final_completion().choices[0].message.content == "It is warm."


TEXTS = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": [1, "}"]}}']
    )
    | st.text(max_size=8),
    max_size=10,
).map("".join)


@settings(deadline=None, max_examples=150)
@given(
    text=st.sampled_from([ANSWER, ANSWER[:-9], ANSWER * 2]) | TEXTS,
    cuts=st.lists(st.integers(0, 400), max_size=12),
    tool_choice=st.sampled_from(["auto", "none"]),
    reason=st.sampled_from(["stop", "length"]),
    parallel=st.booleans(),
)
def test_any_chunks_add_up_to_the_whole(
    text: str, cuts: list[int], tool_choice: str, reason: str, parallel: bool
) -> None:
    body = ChatCompletionRequest(
        messages=HELLO, tools=[WEATHER], tool_choice=tool_choice, parallel_tool_calls=parallel, stream=True
    )
    found = choose_format("", None, (), "hermes", "qwen3")
    commands = [AddRequest("r", [1, 2], SamplingParams())]

    def reply() -> ChatReply:
        chat = body.chat(128)
        return ChatReply("id", "m", body, commands, [answer_parser(found, chat, "")], None)

    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [text[begin:end] for begin, end in pairwise(borders)]
    done, events = Completion(), []
    streamed = reply()
    events += streamed.first_events()
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        delta = OutputDelta("r", part, [7], None, reason if last else None, None, 2, index + 1)
        done.add(delta)
        events += streamed.events(delta)
    whole = reply().whole([done])
    assert without_ids(gathered(events)) == without_ids(plain(whole["choices"][0]))
    assert whole["usage"]["completion_tokens"] == len(parts)


@pytest.mark.parametrize("option", ["tool_call_parser", "reasoning_parser"])
def test_an_unknown_parser_ends_the_start_with_one_line(option: str) -> None:
    with ServerProcess(**{option: "hermess"}) as server:
        code, _, stderr = server.wait()
    assert code == 2
    assert stderr.startswith(f"moe-runtime: error: {option}: 'hermess' is not allowed; it must be one of auto, ")
    assert stderr.count("\n") == 1


def test_a_chat_without_a_format_is_content() -> None:
    assert Chat(HELLO).tools == ()
    (choice,) = post(scripted(ANSWER), ServerConfig(tool_call_parser="none", reasoning_parser="none")).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
