"""Fields of OpenAI's published API: every one is known, and a neutral value never fails a request."""

from __future__ import annotations

import logging
import typing
from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import chat_completion_message_param as message_params
from openai.types.chat import completion_create_params as chat_params
from serve_clients import client_of, run, started
from serve_fakes import FakeEngine

from moe_runtime.serve.chat_messages import Message
from moe_runtime.serve.openai.chat_request import ChatCompletionRequest
from moe_runtime.serve.openai.completions import CompletionRequest
from moe_runtime.serve.openai.fields import NEUTRAL, OpenAIFields, UnknownFields

HELLO = [{"role": "user", "content": "hello"}]
REQUESTS: list[tuple[type[OpenAIFields], type, str, dict[str, Any]]] = [
    (CompletionRequest, completion_params.CompletionCreateParamsBase, "/v1/completions", {"prompt": "a"}),
    (ChatCompletionRequest, chat_params.CompletionCreateParamsBase, "/v1/chat/completions", {"messages": HELLO}),
]
# Values that today's SDKs and frameworks send.
SENT = {
    "store": False,
    "parallel_tool_calls": True,
    "service_tier": "auto",
    "reasoning_effort": "medium",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "metadata": {"run": "1"},
    "modalities": ["text"],
    "verbosity": "medium",
    "prediction": {"type": "content", "content": "a"},
    "user": "u",
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "min_tokens": 0,
    "length_penalty": 1.0,
    "add_special_tokens": False,
    "n": 1,
    "seed": -1,
    "logit_bias": {},
    "stream_options": {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False},
    "chat_template_kwargs": {"enable_thinking": False},
    "some_field_of_next_year": {"a": 1},
}


def post(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async def scenario() -> Any:
        async with started(FakeEngine()) as engine, client_of(engine) as client:
            return await client.post(path, json={**body, "max_tokens": 1})

    response = run(scenario())
    return response.status_code, response.json()


@pytest.mark.parametrize(("model", "published", "path", "body"), REQUESTS, ids=["completions", "chat"])
def test_every_published_field_is_known(
    model: type[OpenAIFields], published: type, path: str, body: dict[str, Any]
) -> None:
    """If this fails, the installed `openai` package has new fields: say in `fields.py` what they do here."""
    unknown = set(typing.get_type_hints(published)) - set(model.model_fields) - set(NEUTRAL)
    assert unknown == set()


@pytest.mark.parametrize("kind", typing.get_args(message_params.ChatCompletionMessageParam), ids=lambda t: t.__name__)
def test_every_published_field_of_a_message_is_known(kind: type) -> None:
    assert set(typing.get_type_hints(kind)) - set(Message.model_fields) <= {"audio"}


@pytest.mark.parametrize(("model", "published", "path", "body"), REQUESTS, ids=["completions", "chat"])
def test_null_is_as_if_it_were_not_given(
    model: type[OpenAIFields], published: type, path: str, body: dict[str, Any]
) -> None:
    names = {*typing.get_type_hints(published), *model.model_fields, *NEUTRAL} - {"max_tokens"}
    assert post(path, {**dict.fromkeys(names), **body})[0] == 200


@pytest.mark.parametrize(("path", "body"), [request[2:] for request in REQUESTS], ids=["completions", "chat"])
@pytest.mark.parametrize("name", SENT)
def test_what_clients_send_every_day_is_taken(name: str, path: str, body: dict[str, Any]) -> None:
    status, answer = post(path, {**body, name: SENT[name]})
    assert status == 200, answer


@pytest.mark.parametrize(("path", "body"), [request[2:] for request in REQUESTS], ids=["completions", "chat"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_not_done_is_refused_by_name_and_neutral_values_are_taken(
    name: str, path: str, body: dict[str, Any]
) -> None:
    for value in NEUTRAL[name]:
        assert post(path, {**body, name: value})[0] == 200
    status, answer = post(path, {**body, name: {"not": "neutral"}})
    assert status == 400
    assert answer["error"]["param"] == name
    assert answer["error"]["message"].startswith(f"{name}: {{'not': 'neutral'}} is not supported; it must be left out")


def test_unknown_fields_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moe_runtime")
    unknown = UnknownFields()
    for _ in range(3):
        unknown.note(CompletionRequest.model_validate({"prompt": "a", "new_field": 1, "x" * 99: 2}))
    assert [record.getMessage() for record in caplog.records] == [f"fields without effect: 'new_field', {'x' * 40!r}"]
    unknown.note(CompletionRequest.model_validate({"prompt": "a", **{f"g{number}": 1 for number in range(90)}}))
    for number in range(500):
        unknown.note(CompletionRequest.model_validate({"prompt": "a", f"f{number}": 1}))
    assert len(caplog.records) <= 101
