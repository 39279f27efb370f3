"""Gemma 4: `<|tool_call>call:NAME{key:<|"|>text<|"|>,days:3}<tool_call|>`."""

from __future__ import annotations

import re

from moe_runtime.text.formats.json_builder import JsonBuilder
from moe_runtime.text.formats.json_text import read_string
from moe_runtime.text.formats.output import Output
from moe_runtime.text.formats.scanner import Scanner, Steps, Tags
from moe_runtime.text.formats.schema import json_of
from moe_runtime.text.formats.tool_format import NAME, ToolFormat

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
KEY_TEXT = re.compile(r'[^:,{}\[\]<"]*')
VALUE_TEXT = re.compile(r"[^,{}\[\]<]*")
STRING_END = Tags(QUOTE)


def _read(tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
    yield from scanner.blanks()
    yield from scanner.accept("call:")
    yield from scanner.blanks()
    name = yield from scanner.word(NAME)
    if (yield from scanner.blanks()) == "{" and name:
        call = output.begin_call(name)
        yield from _read_object(scanner, JsonBuilder(call.write))
    yield from scanner.blanks()
    yield from scanner.accept(CLOSE)
    return True


def _read_object(scanner: Scanner, builder: JsonBuilder) -> Steps[None]:
    """Convert an object to JSON. Commas and colons follow from the order of the items, so they are dropped."""
    while not scanner.at_end:
        char = yield from scanner.blanks()
        if char in ("{", "["):
            yield from scanner.take(1)
            builder.open(char)
        elif char in ("}", "]"):
            yield from scanner.take(1)
            builder.close()
        elif (yield from scanner.accept(QUOTE)):
            builder.begin_string()
            if not (yield from scanner.until(STRING_END, builder.string, release=False)):
                return
            builder.end_string()
        elif char == '"':  # a string of JSON
            builder.begin_string()
            if not (yield from read_string(scanner, builder.string)):
                return
            builder.end_string()
        elif char in (",", ":"):
            yield from scanner.take(1)
            if char == "," and builder.wants_value:
                builder.scalar("null")  # the value is missing
        elif char == "<" and (yield from scanner.accept(CLOSE)):
            while builder.depth:  # brackets are missing
                builder.close()
        elif builder.wants_key:
            yield from _read_key(scanner, builder)
        else:
            yield from _read_bare(scanner, builder)
        if not builder.depth:
            return


def _read_key(scanner: Scanner, builder: JsonBuilder) -> Steps[None]:
    key = (yield from scanner.word(KEY_TEXT)).strip()
    is_quoted = yield from scanner.accept(QUOTE)
    if scanner.at_end and not is_quoted:
        return
    if key:
        builder.scalar(JsonBuilder.quote(key))
    elif not is_quoted:
        yield from scanner.accept("<")


def _read_bare(scanner: Scanner, builder: JsonBuilder) -> Steps[None]:
    """Convert a number or a word, or a string without its opening delimiter. In an object, commas may be part of it."""
    text = yield from scanner.word(VALUE_TEXT)
    next_key = ""
    while builder.wants_value and (yield from scanner.accept(",")):
        next_key = yield from scanner.word(KEY_TEXT)
        if (yield from scanner.look(1)) not in (",", "}") or not next_key.strip():
            break
        text, next_key = f"{text},{next_key}", ""
    is_quoted = not next_key and (yield from scanner.accept(QUOTE))
    rest = yield from scanner.look(len(QUOTE))
    if len(rest) < len(QUOTE) and QUOTE.startswith(rest) and not is_quoted:  # cut off
        yield from scanner.take(len(rest))
        return
    text = text.strip()
    found = None if is_quoted else json_of(text, frozenset())
    if text or is_quoted:
        builder.scalar(JsonBuilder.quote(text) if found is None else found)
    else:
        yield from scanner.accept("<")
    if next_key.strip():
        builder.scalar(JsonBuilder.quote(next_key.strip()))


GEMMA4 = ToolFormat(opens=(OPEN,), read=_read, tags=(CLOSE, QUOTE), stop_tokens=("<|tool_response>",))
