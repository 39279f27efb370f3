"""GLM 4.5 to 4.7: `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`."""

from __future__ import annotations

import re

from moe_runtime.text.formats.json_builder import JsonBuilder
from moe_runtime.text.formats.json_text import read_calls
from moe_runtime.text.formats.output import Call, Output
from moe_runtime.text.formats.scanner import Scanner, Steps, Tags, drop
from moe_runtime.text.formats.schema import RawValue
from moe_runtime.text.formats.tool_format import ToolFormat

CLOSE, KEY, KEY_END, VALUE, VALUE_END = "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
CALL_NAME = re.compile(r"[^\s<]*")
KEY_TEXT = re.compile(r"[^<]*")
BETWEEN = Tags(KEY, CLOSE)
VALUE_ENDS = Tags(VALUE_END)


def _read(tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
    if (yield from scanner.blanks()) == "{":
        found = yield from read_calls(scanner, output)
        yield from scanner.blanks()
        yield from scanner.accept(CLOSE)
        return found
    name = yield from scanner.word(CALL_NAME)
    yield from scanner.blanks()
    if scanner.at_end:
        return True
    found_tag = yield from scanner.accept(KEY, CLOSE)
    # Without arguments, "<tool_call>x</tool_call>" may be a text about tags.
    if not name or not found_tag or (found_tag == CLOSE and not output.knows(name)):
        return scanner.ended and not found_tag
    call = output.begin_call(name)
    builder = JsonBuilder(call.write)
    builder.open("{")
    while found_tag == KEY:
        if not (yield from _argument(scanner, call, builder)):
            return True
        found_tag = yield from scanner.until(BETWEEN, drop)
    if found_tag:
        builder.close()
    return True


def _argument(scanner: Scanner, call: Call, builder: JsonBuilder) -> Steps[bool]:
    """Read a key and its value. False: the text ends before. The tags between them may be missing or doubled."""
    key = ""
    while not key and not scanner.at_end:
        key = (yield from scanner.word(KEY_TEXT)).strip()
        if not key and not (yield from scanner.accept(KEY, KEY_END)):
            break
    yield from scanner.accept(KEY_END)
    yield from scanner.blanks()
    if not (yield from scanner.accept(VALUE)) and scanner.ended:
        return False
    builder.scalar(JsonBuilder.quote(key))
    value = RawValue(call.types.get(key, frozenset()), builder)
    if not (yield from scanner.until(VALUE_ENDS, value.write, release=False)):
        return False
    value.close()
    return True


GLM = ToolFormat(
    opens=("<tool_call>",),
    read=_read,
    tags=(CLOSE, KEY, KEY_END, VALUE, VALUE_END),
    stop_tokens=("<|endoftext|>", "<|user|>", "<|observation|>"),
)
