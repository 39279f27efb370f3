"""Formats whose calls are JSON objects between tags: Hermes, Granite, Hunyuan, Llama 3."""

from __future__ import annotations

from moe_runtime.text.formats.json_text import read_calls, read_open_call
from moe_runtime.text.formats.output import Output
from moe_runtime.text.formats.scanner import Scanner, Steps
from moe_runtime.text.formats.tool_format import ReadCalls, ToolFormat

PYTHON_TAG = "<|python_tag|>"


def json_between(opens: tuple[str, ...], close: str) -> ToolFormat:
    """Objects or lists of them after an opening tag; the closing tag may be missing."""
    return ToolFormat(opens=opens, read=_reader(close), tags=(close,))


def _reader(close: str) -> ReadCalls:
    def read(tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
        found = yield from read_calls(scanner, output)
        if found:
            yield from scanner.blanks()
            yield from scanner.accept(close)
        return found

    return read


def _read_llama3(tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
    if tag == PYTHON_TAG:
        char = yield from scanner.blanks()
        if char in ("{", "["):
            yield from read_calls(scanner, output)
        return True  # else code for a built-in tool, which is shown without its tag
    found = yield from read_open_call(scanner, output, known_only=True)
    if found:
        yield from scanner.blanks()
        yield from scanner.accept(";")
    return found


HERMES = json_between(("<tool_call>",), "</tool_call>")
GRANITE = json_between(("<|tool_call|>", "<tool_call>"), "</tool_call>")
HUNYUAN = json_between(("<tool_calls>",), "</tool_calls>")
LLAMA3 = ToolFormat(opens=(PYTHON_TAG, "{"), read=_read_llama3, stop_tokens=("<|eom_id|>", "<|eot_id|>"))
