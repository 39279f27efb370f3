"""Calls that a grammar forces are read by the format's parser, with arguments that are valid by the tool's schema."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from chat_wire import parse
from grammar_walk import Walker

from moe_runtime.text.formats.call_forms import FORMS, call_form
from moe_runtime.text.formats.call_grammar import call_grammar
from moe_runtime.text.formats.registry import HARMONY_THOUGHTS, TOOL_FORMATS, ChatFormat
from moe_runtime.types.structured_outputs import StructuredOutputs

DEEPSEEK = "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜>"
SPECIAL = {
    "deepseek_v3": DEEPSEEK.split(),
    "glm45": ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    "hermes": ["<tool_call>", "</tool_call>"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    "openai": ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"],
    "gemma4": ["<|tool_call>", "<tool_call|>", '<|"|>'],
    "granite": ["<|tool_call|>"],
}
SPECIAL["deepseek_v31"] = SPECIAL["deepseek_v3"]
SPECIAL["glm47"] = SPECIAL["glm45"]
SPECIAL["qwen3_coder"] = SPECIAL["ernie45"] = SPECIAL["hermes"]
CLOSERS = ["\n</parameter>\n", "</parameter>\n", "</parameter>", "</arg_value>\n", "</arg_value>", '"', "0"]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 12},
                    "days": {"type": "integer", "minimum": 0, "maximum": 14},
                    "unit": {"enum": ["C", "F"]},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "of the user"},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "plan-trip",
            "parameters": {
                "type": "object",
                "$defs": {"Stop": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
                "properties": {
                    "when": {"type": "string", "format": "date"},
                    "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]+$"},
                    "stops": {"type": "array", "items": {"$ref": "#/$defs/Stop"}, "maxItems": 3},
                    "first": {"$ref": "#/$defs/Stop"},
                    "exact": {"type": "boolean"},
                },
                "required": ["when", "stops", "exact", "code", "first"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters") for tool in TOOLS}


def calls_of(text: str, tool_format: str) -> list[tuple[str, str]]:
    """Names and arguments that the parser finds."""
    thoughts = HARMONY_THOUGHTS if tool_format == "openai" else None
    prompt = "<|start|>assistant" if thoughts else ""
    parsed = parse(ChatFormat(tool_format, thoughts), [text], prompt, TOOLS, is_complete=True)
    assert not parsed.content.strip(), parsed.content
    return [(call["name"], call["arguments"]) for call in parsed.calls]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("tool_format", sorted(FORMS))
def test_calls_are_valid(tool_format: str, special: bool) -> None:
    assert set(FORMS) == set(TOOL_FORMATS)
    if special and tool_format not in SPECIAL:
        pytest.skip("the format's tags are plain text")
    walker = Walker(SPECIAL[tool_format] if special else (), CLOSERS)
    grammar = call_grammar(call_form(tool_format, walker.added), TOOLS, walker.added, parallel=True)
    rng, ended = random.Random(), 0
    for _ in range(12):
        text = walker.output(StructuredOutputs(grammar=grammar), rng)
        if text is None:
            continue
        ended += 1
        calls = calls_of(text, tool_format)
        assert calls, text
        for name, arguments in calls:
            schema = SCHEMAS[name] or {"type": "object", "maxProperties": 0}
            try:
                jsonschema.validate(json.loads(arguments), schema)
            except Exception as error:
                raise AssertionError(f"{text!r}: {arguments!r}") from error
    assert ended > 6


def test_alternatives_that_references_multiply_are_refused() -> None:
    schema: dict[str, Any] = {"type": "boolean"}
    levels = {f"L{level}": {"anyOf": [{"$ref": f"#/$defs/L{level + 1}"}] * 10} for level in range(2)}
    parameters = {"properties": {"a": {"$ref": "#/$defs/L0"}}, "$defs": {**levels, "L2": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(ValueError, match=r"'f' cannot be forced: its parameter 'a' has more than 64 alternatives"):
        call_grammar(FORMS["glm45"], [tool], {}, parallel=True)
