"""GLM 4.5 to 4.7: `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`."""

from __future__ import annotations

import re

from moe_runtime.text.formats.json_builder import JsonBuilder
from moe_runtime.text.formats.json_objects import FENCE, read_block
from moe_runtime.text.formats.output import Call, Output
from moe_runtime.text.formats.scanner import BLANK_RUN, Scanner, Steps, Tags, drop
from moe_runtime.text.formats.schema import RawValue
from moe_runtime.text.formats.tool_format import ToolFormat

CLOSE, KEY, KEY_END, VALUE, VALUE_END = "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
CALL_NAME = re.compile(r"[^\s<]*")
KEY_TEXT = re.compile(r"[^<]*")
BETWEEN = Tags(KEY, CLOSE)
VALUE_ENDS = Tags(VALUE_END, KEY, CLOSE, "\n" + KEY, "\n" + CLOSE)


def _read(tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
    before = yield from scanner.word(BLANK_RUN)
    if (yield from scanner.look(1)) in ("{", "[", FENCE[0]):
        return (yield from read_block(scanner, output, CLOSE))
    name = yield from scanner.word(CALL_NAME)
    after = yield from scanner.word(BLANK_RUN)
    if scanner.at_end:
        return True
    found = yield from scanner.accept(KEY, CLOSE)
    # Without arguments, "<tool_call> and </tool_call>" may be a text about tags.
    is_prose = found == CLOSE and " " in before + after and not output.knows(name)
    if not name or not found or is_prose:
        return scanner.ended and not found
    call = output.begin_call(name)
    builder = JsonBuilder(call.write)
    builder.open("{")
    while found == KEY:
        found = yield from _argument(scanner, call, builder)
        if found == VALUE_END:
            found = yield from scanner.until(BETWEEN, drop)
    if found:
        builder.close()
    return True


def _argument(scanner: Scanner, call: Call, builder: JsonBuilder) -> Steps[str]:
    """Read a key and its value. The tags between them may be missing or doubled.

    Returns:
        The tag that ends the value: its closing tag, or if that is missing, the next one. "" if the text ends before.
    """
    key = ""
    while not key and not scanner.at_end:
        key = (yield from scanner.word(KEY_TEXT)).strip()
        if not key and not (yield from scanner.accept(KEY, KEY_END)):
            break
    yield from scanner.accept(KEY_END)
    yield from scanner.blanks()
    if not (yield from scanner.accept(VALUE)) and scanner.ended:
        return ""
    builder.scalar(JsonBuilder.quote(key))
    value = RawValue(call.types.get(key, frozenset()), builder)
    found = yield from scanner.until(VALUE_ENDS, value.write, release=False)
    if found:
        value.close()
    return found.removeprefix("\n")


GLM = ToolFormat(
    opens=("<tool_call>",),
    read=_read,
    tags=(CLOSE, KEY, KEY_END, VALUE, VALUE_END),
    stop_tokens=("<|endoftext|>", "<|user|>", "<|observation|>"),
)
