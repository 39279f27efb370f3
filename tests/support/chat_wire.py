"""Writes calls and thoughts in the wire formats of model families, for tests of their parsers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_runtime.text.formats.output import ChatDelta
from moe_runtime.text.formats.registry import ChatFormat

CITY = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "share": {"type": "number"},
                "opt": {"type": "object"},
                "tags": {"type": "array"},
                "unit": {"type": ["string", "null"]},
            },
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
DOTTED = {"type": "function", "function": {"name": "web.find-all_2"}}
TOOLS = [CITY, NOW, DOTTED]


@dataclass
class Parsed:
    """All deltas of an output, joined as a client joins them."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)

    def add(self, delta: ChatDelta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning
        for call in delta.tool_calls:
            if call.index == len(self.calls):
                assert call.id and call.name
                self.calls.append({"id": call.id, "name": call.name, "arguments": call.arguments})
            else:
                assert call.index == len(self.calls) - 1 and call.id is None and call.name is None
                self.calls[-1]["arguments"] += call.arguments

    def values(self) -> list[tuple[str, Any]]:
        return [(call["name"], json.loads(call["arguments"])) for call in self.calls]


def parse(
    chat_format: ChatFormat,
    pieces: Iterable[str],
    prompt: str = "",
    tools: Sequence[dict[str, Any]] = TOOLS,
    calls: bool = True,
    num_earlier_calls: int = 0,
    continued: str = "",
    is_complete: bool = False,
) -> Parsed:
    numbers = itertools.count()
    parser = chat_format.parser(
        prompt,
        tools,
        calls=calls,
        num_earlier_calls=num_earlier_calls,
        new_id=lambda: f"{next(numbers):024x}",
        continued=continued,
    )
    parsed = Parsed()
    for piece in pieces:
        parsed.add(parser.feed(piece))
    parsed.add(parser.finish(is_complete))
    return parsed


Calls = Sequence[tuple[str, dict[str, Any]]]


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def json_calls(calls: Calls, key: str = "arguments") -> list[str]:
    return [to_json({"name": name, key: arguments}) for name, arguments in calls]


def hermes(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in json_calls(calls))


def raw(value: Any) -> str:
    """As templates with a string filter write it."""
    return value if isinstance(value, str) else to_json(value) if isinstance(value, dict | list) else str(value)


def qwen3_coder(calls: Calls, block: str = "tool_call") -> str:
    return "\n".join(
        f"<{block}>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{raw(value)}\n</parameter>\n" for key, value in arguments.items())
        + f"</function>\n</{block}>"
        for name, arguments in calls
    )


def minimax(calls: Calls, block: str = "minimax:tool_call") -> str:
    invokes = "".join(
        f'<invoke name="{name}">\n'
        + "".join(f'<parameter name="{key}">{as_glm(value)}</parameter>\n' for key, value in arguments.items())
        + "</invoke>\n"
        for name, arguments in calls
    )
    return f"<{block}>\n{invokes}</{block}>"


def as_glm(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def glm45(calls: Calls) -> str:
    return "".join(
        f"\n<tool_call>{name}\n"
        + "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{as_glm(value)}</arg_value>\n" for key, value in arguments.items()
        )
        + "</tool_call>"
        for name, arguments in calls
    )


def glm47(calls: Calls) -> str:
    return glm45(calls).replace("</arg_key>\n", "</arg_key>").replace("\n<arg_key>", "<arg_key>").lstrip("\n")


def deepseek_v3(calls: Calls) -> str:
    parts = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{to_json(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(parts) + "<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Calls) -> str:
    parts = [f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{to_json(args)}<｜tool▁call▁end｜>" for name, args in calls]
    return "<｜tool▁calls▁begin｜>" + "".join(parts) + "<｜tool▁calls▁end｜>"


def kimi_k2(calls: Calls) -> str:
    parts = [
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{to_json(args)}<|tool_call_end|>"
        for index, (name, args) in enumerate(calls)
    ]
    return "<|tool_calls_section_begin|>" + "".join(parts) + "<|tool_calls_section_end|>"


def pythonic(calls: Calls) -> str:
    parts = [f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in calls]
    return f"[{', '.join(parts)}]"


def as_gemma(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_gemma(item)}" for key, item in value.items()) + "}"
    return "[" + ",".join(map(as_gemma, value)) + "]" if isinstance(value, list) else to_json(value)


def gemma4(calls: Calls) -> str:
    return "".join(f"<|tool_call>call:{name}{as_gemma(arguments)}<tool_call|>" for name, arguments in calls)


def harmony(calls: Calls) -> str:
    headers = (
        "<|start|>assistant<|channel|>commentary to=functions.{} <|constrain|>json<|message|>",
        "<|start|>assistant to=functions.{}<|channel|>commentary json<|message|>",
    )
    return "".join(
        headers[index % 2].format(name) + to_json(arguments) + "<|call|>"
        for index, (name, arguments) in enumerate(calls)
    )


def think(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


@dataclass(frozen=True)
class Wire:
    """How a format writes a turn. `is_raw`: strings are raw text, which may not hold the tag that ends them."""

    tool_format: str
    calls: Callable[[Calls], str]
    reasoning_format: str | None = None
    thought: Callable[[str], str] = think
    text: Callable[[str], str] = str
    is_raw: bool = False


WIRES = {
    "hermes": Wire("hermes", hermes, "qwen3"),
    "qwen3_coder": Wire("qwen3_coder", qwen3_coder, "qwen3", is_raw=True),
    "seed_oss": Wire(
        "seed_oss",
        lambda calls: qwen3_coder(calls, "seed:tool_call"),
        "seed_oss",
        lambda text: f"<seed:think>{text}</seed:think>",
        is_raw=True,
    ),
    "minimax_m2": Wire("minimax_m2", minimax, "minimax_m2", is_raw=True),
    "dots": Wire("dots", lambda calls: minimax(calls, "dots_function_call"), is_raw=True),
    "glm45": Wire("glm45", glm45, "glm45", lambda text: f"\n<think>{text}</think>\n", is_raw=True),
    "glm47": Wire("glm47", glm47, "glm47", lambda text: f"<think>{text}</think>", is_raw=True),
    "mistral old": Wire("mistral", lambda calls: f"[TOOL_CALLS] [{', '.join(json_calls(calls))}]"),
    "mistral new": Wire(
        "mistral",
        lambda calls: "".join(f"[TOOL_CALLS]{name}[ARGS]{to_json(args)}" for name, args in calls),
        "mistral",
        lambda text: f"[THINK]{text}[/THINK]",
    ),
    "llama3_json": Wire("llama3_json", lambda calls: "; ".join(json_calls(calls, "parameters"))),
    "llama3 tag": Wire("llama3_json", lambda calls: "<|python_tag|>" + "; ".join(json_calls(calls, "parameters"))),
    "pythonic": Wire("pythonic", pythonic),
    "pythonic tags": Wire("llama4_pythonic", lambda calls: f"<|python_start|>{pythonic(calls)}<|python_end|>"),
    "lfm2": Wire("lfm2", lambda calls: f"<|tool_call_start|>{pythonic(calls)}<|tool_call_end|>"),
    "deepseek_v3": Wire("deepseek_v3", deepseek_v3, "deepseek_r1"),
    "deepseek_v31": Wire("deepseek_v31", deepseek_v31, "deepseek_v3"),
    "kimi_k2": Wire("kimi_k2", kimi_k2, "kimi_k2", lambda text: f"<think>{text}</think>"),
    "openai": Wire(
        "openai",
        harmony,
        "openai_gptoss",
        lambda text: f"<|channel|>analysis<|message|>{text}<|end|>",
        lambda text: f"<|start|>assistant<|channel|>commentary<|message|>{text}<|end|>",
    ),
    "gemma4": Wire("gemma4", gemma4, "gemma4", lambda text: f"<|channel>thought\n{text}\n<channel|>"),
    "granite": Wire("granite", lambda calls: f"<tool_call>[{', '.join(json_calls(calls))}]"),
    "granite 3.0": Wire("granite", lambda calls: f"<|tool_call|>[{', '.join(json_calls(calls))}]"),
    "granite4": Wire("granite4", hermes, "granite"),
    "granite 3.2": Wire(
        "granite", hermes, "granite", lambda text: f"Here is my thought process:\n{text}\nHere is my response:\n"
    ),
    "hunyuan_a13b": Wire(
        "hunyuan_a13b",
        lambda calls: f"<tool_calls>[{', '.join(json_calls(calls))}]</tool_calls>",
        "hunyuan_a13b",
        think,
        lambda text: f"<answer>\n{text}\n</answer>",
    ),
    "ernie45": Wire("ernie45", hermes, "ernie45", think, lambda text: f"<response>\n{text}\n</response>\n"),
}


def parse_at_every_cut(chat_format: ChatFormat, text: str, **options: Any) -> Parsed:
    """The result of a text, which is the same whole, in single characters, and cut in two or in three."""
    whole = parse(chat_format, [text], **options)
    step = max(1, len(text) // 6)
    cuts = [[text[:cut], text[cut:]] for cut in range(len(text))]
    cuts += [[text[:a], text[a:b], text[b:]] for a in range(0, len(text), step) for b in range(a, len(text), step)]
    for pieces in (list(text), *cuts):
        assert parse(chat_format, pieces, **options) == whole, pieces
    return whole
