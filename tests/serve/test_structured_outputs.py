"""OpenAI's client asks for answers of a form: schemas, tools that must be called, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from fakes import save_byte_tokenizer
from real_server import RealServer
from serve_clients import DEFAULTS, ServerThread
from serve_fakes import DEADLINE
from tiny_models import make_model, save

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig

MESSAGES: Any = [{"role": "user", "content": "naïve 🙂"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 4}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "look", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.fixture
def client(real: RealServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0, timeout=DEADLINE) as client:
        yield client


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a model that writes Hermes' tool calls and thoughts."""
    folder: Path = tmp_path_factory.mktemp("caller")
    tokenizer = save_byte_tokenizer(folder)
    sizes = {"vocab_size": tokenizer.vocab_size + 3, "max_position_embeddings": 400}
    save(make_model("qwen3", eos_token_id=0, **sizes), folder)
    config = EngineConfig(str(folder), dtype="float32", device="cpu", max_model_len=400, max_num_seqs=4)
    server = ServerThread(
        lambda: build_engine(config), replace(DEFAULTS, tool_call_parser="hermes", reasoning_parser="qwen3")
    )
    with server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=DEADLINE) as client:
        yield client


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_is_valid_by_its_schema_and_the_stream_is_the_same(client: openai.OpenAI, seed: int) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "seed": seed}
    options["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    whole = client.chat.completions.create(**options).choices[0]
    text = whole.message.content
    if whole.finish_reason == "stop":
        jsonschema.validate(json.loads(text), SCHEMA)
    pieces = [choice for chunk in client.chat.completions.create(stream=True, **options) for choice in chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == text


def test_objects_and_vllms_field_on_every_endpoint(client: openai.OpenAI, real: RealServer) -> None:
    choices = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=30, n=3, response_format={"type": "json_object"}
    ).choices
    assert all(choice.message.content.startswith("{") for choice in choices)
    asked = {"structured_outputs": {"choice": ["calm", "wild"]}}
    completion = client.completions.create(model="tiny", prompt="The sea is ", extra_body=asked)
    assert completion.choices[0].text in ("calm", "wild")
    answer = httpx.post(real.url + "/generate", json={"prompt": "The sea is ", **asked}, timeout=DEADLINE).json()
    assert answer["text"] in ("calm", "wild") and answer["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format: "),
        ({"response_format": {"type": "yaml"}}, "response_format: "),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs: regex is not allowed: "),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs: it must have a text as regex"),
        ({"structured_outputs": {"json": {"type": "no"}}}, "structured_outputs: json is not allowed: "),
        ({"structured_outputs": {}}, "exactly one of json"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format: is not allowed beside structured_outputs",
        ),
        ({"tool_choice": "required"}, "tool_choice: 'required' is not allowed; tools must have a tool that fits it"),
        ({"tool_choice": "required", "tools": TOOLS}, "tool_choice: this model has no format of tool calls"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "no"}}, "tools": TOOLS},
            "tools must have a tool that fits it",
        ),
        ({"tool_choice": {"type": "function"}}, "tool_choice: "),
    ],
)
def test_what_is_refused(real: RealServer, body: dict[str, Any], message: str) -> None:
    answer = httpx.post(
        real.url + "/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, **body}, timeout=DEADLINE
    )
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_tool_is_called_with_valid_arguments(caller: openai.OpenAI, choice: Any, seed: int) -> None:
    options: Any = {"model": "", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": seed}
    options |= {"model": caller.models.list().data[0].id, "max_tokens": 300, "temperature": 0.7}
    options |= {"logit_bias": {}, "parallel_tool_calls": False}
    whole = caller.chat.completions.create(**options).choices[0]
    pieces = [each for chunk in caller.chat.completions.create(stream=True, **options) for each in chunk.choices]
    calls = whole.message.tool_calls or []
    streamed = "".join(
        call.function.arguments or "" for piece in pieces for call in piece.delta.tool_calls or () if call.function
    )
    assert streamed == "".join(call.function.arguments for call in calls)
    if whole.finish_reason == "length":  # within its thought, or a call that was cut off
        return
    assert whole.finish_reason == "tool_calls" and not whole.message.content
    (call,) = calls
    assert call.function.name in (["look"] if isinstance(choice, dict) else ["look", "stop"])
    jsonschema.validate(
        json.loads(call.function.arguments), SCHEMA if call.function.name == "look" else {"maxProperties": 0}
    )
