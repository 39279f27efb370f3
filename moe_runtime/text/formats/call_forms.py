"""How each tool format writes calls, for grammars that make a model write them. The parsers read more than this.

In the texts, NAME and KEY stand for a tool's name and a parameter's. Sources: the chat templates of the models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

COUNTER = "\0"  # stands for a number


@dataclass(frozen=True)
class RawArguments:
    """Arguments that are written one by one, strings without quotes.

    Attributes:
        opens, closes: around a value.
        quotes: around a string; None where it has the same texts around it as other values, and nothing else.
        strings_are_json: strings are written as in JSON too.
        between: two arguments.
        ends_at_first: a value ends with the first text that looks like the end, also within a string of JSON.
    """

    opens: str
    closes: str
    quotes: str | None = None
    strings_are_json: bool = False
    between: str = ""
    ends_at_first: bool = False


@dataclass(frozen=True)
class CallForm:
    """How calls are written.

    Attributes:
        before, after: around a call's arguments.
        opens, closes: around all calls.
        between: two calls.
        arguments: None: a JSON object.
        is_single: there is one call in a turn.
    """

    before: str
    after: str
    opens: str = ""
    closes: str = ""
    between: str = ""
    arguments: RawArguments | None = None
    is_single: bool = False


def _json_list(opens: str, closes: str) -> CallForm:
    return CallForm('{"name": "NAME", "arguments": ', "}", opens + "[", "]" + closes, ", ")


def _xml(opens: str, closes: str, call: str, call_end: str, parameter: str, parameter_end: str) -> CallForm:
    return CallForm(call, call_end, opens, closes, arguments=RawArguments(parameter, parameter_end))


HERMES = CallForm('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", between="\n")
QWEN3_CODER = CallForm(
    "<tool_call>\n<function=NAME>\n",
    "</function>\n</tool_call>",
    between="\n",
    arguments=RawArguments("<parameter=KEY>\n", "\n</parameter>\n"),
)
GLM45 = CallForm(
    "<tool_call>NAME\n",
    "</tool_call>",
    between="\n",
    arguments=RawArguments("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n", ends_at_first=True),
)
GLM47 = CallForm(
    "<tool_call>NAME",
    "</tool_call>",
    arguments=RawArguments("<arg_key>KEY</arg_key><arg_value>", "</arg_value>", ends_at_first=True),
)
MISTRAL = CallForm("[TOOL_CALLS]NAME[ARGS]", "")
PYTHON_ARGUMENTS = RawArguments("KEY=", "", strings_are_json=True, between=", ")
DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

FORMS: Mapping[str, CallForm] = {
    "hermes": HERMES,
    "ernie45": HERMES,
    "granite": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "seed_oss": _xml(
        "<seed:tool_call>\n",
        "</seed:tool_call>",
        "<function=NAME>\n",
        "</function>\n",
        "<parameter=KEY>",
        "</parameter>\n",
    ),
    "minimax_m2": _xml(
        "<minimax:tool_call>\n",
        "</minimax:tool_call>",
        '<invoke name="NAME">\n',
        "</invoke>\n",
        '<parameter name="KEY">',
        "</parameter>\n",
    ),
    "dots": _xml(
        "<dots_function_call>",
        "</dots_function_call>",
        '<invoke name="NAME">',
        "</invoke>",
        '<parameter name="KEY">',
        "</parameter>",
    ),
    "glm45": GLM45,
    "glm47": GLM47,
    "mistral": MISTRAL,
    "llama3_json": CallForm('{"name": "NAME", "parameters": ', "}", between="; "),
    "pythonic": CallForm("NAME(", ")", "[", "]", ", ", PYTHON_ARGUMENTS),
    "lfm2": CallForm("NAME(", ")", "<|tool_call_start|>[", "]<|tool_call_end|>", ", ", PYTHON_ARGUMENTS),
    "deepseek_v3": CallForm(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        "\n```<｜tool▁call▁end｜>",
        *DEEPSEEK_SECTION,
        between="\n",
    ),
    "deepseek_v31": CallForm("<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>", "<｜tool▁call▁end｜>", *DEEPSEEK_SECTION),
    "kimi_k2": CallForm(
        f"<|tool_call_begin|>functions.NAME:{COUNTER}<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
    ),
    "openai": CallForm("<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", "", is_single=True),
    "gemma4": CallForm(
        "<|tool_call>call:NAME{", "}<tool_call|>", arguments=RawArguments("KEY:", "", '<|"|>', between=",")
    ),
    "hunyuan_a13b": _json_list("<tool_calls>", "</tool_calls>"),
}


def call_form(tool_format: str, tokens: Collection[str]) -> CallForm:
    """The form of a format, as the models write it that have these tokens."""
    if tool_format == "mistral" and "[ARGS]" not in tokens:  # before its eleventh tokenizer
        return _json_list("[TOOL_CALLS]", "")
    if tool_format == "granite" and "<|tool_call|>" in tokens:
        return _json_list("<|tool_call|>", "")
    return FORMS[tool_format]
