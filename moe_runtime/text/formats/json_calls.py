"""Formats whose calls are JSON objects between tags: Hermes, Granite, Hunyuan, Llama 3."""

from __future__ import annotations

import re

from moe_runtime.text.formats.json_objects import read_block, read_calls, read_known_calls, read_open_call
from moe_runtime.text.formats.output import Output
from moe_runtime.text.formats.scanner import Scanner, Steps, drop
from moe_runtime.text.formats.tool_format import ToolFormat

PYTHON_TAG = "<|python_tag|>"
BARE = ("{", "[")
EXTRA_BRACES = re.compile(r"[ \t\r\n}]*")


def json_between(opens: tuple[str, ...], *closes: str) -> ToolFormat:
    """Objects or lists of them after an opening tag; the closing tag may be missing."""

    def read(tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
        return (yield from read_block(scanner, output, *closes))

    return ToolFormat(opens=opens, read=read, tags=closes)


def _read_llama3(tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
    if tag == PYTHON_TAG:
        char = yield from scanner.blanks()
        if char in ("{", "["):
            yield from read_calls(scanner, output)
        return True  # else code for a built-in tool, which is shown without its tag
    if tag == "[":
        return (yield from read_known_calls(scanner, output))
    found = yield from read_open_call(scanner, output, known_only=True)
    if found:
        yield from scanner.span(EXTRA_BRACES, drop)
        yield from scanner.accept(";")
    return found


HERMES = json_between(("<tool_call>",), "</tool_call>")
GRANITE = json_between(("<|tool_call|>", "<tool_call>"), "</tool_call>", "<|/tool_call|>")
HUNYUAN = json_between(("<tool_calls>",), "</tool_calls>")
LLAMA3 = ToolFormat(
    opens=(PYTHON_TAG, *BARE),
    read=_read_llama3,
    plain_opens=BARE,
    stop_tokens=("<|eom_id|>", "<|eot_id|>"),
)
