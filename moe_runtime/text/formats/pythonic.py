"""Calls written as Python, `[f(a="x", days=3), g()]`: Llama 4, where tags around the list are optional, and LFM2."""

from __future__ import annotations

import math
import re

from moe_runtime.text.formats.json_builder import JsonBuilder
from moe_runtime.text.formats.json_text import JSON_ESCAPES, read_call, read_string
from moe_runtime.text.formats.output import Call, Output
from moe_runtime.text.formats.scanner import Scanner, Steps, drop
from moe_runtime.text.formats.schema import json_of
from moe_runtime.text.formats.tool_format import NAME, ToolFormat

PYTHON_ESCAPES = {**JSON_ESCAPES, "'": "'", "\n": "", "0": "\0", "a": "\a", "v": "\v"}
PYTHON_ESCAPES.pop("/")
WORD = re.compile(r"[\w.+\-]*")
STRING_PREFIXES = frozenset("r b u f rb br fr rf".split())  # noqa: SIM905
TO_NEXT = re.compile(r"[^,)]*")
CLOSERS = (")", "]", "}")
BRACKETS = {"(": "[", "[": "[", "{": "{"}
LIST_ENDS = ("<|python_end|>", "<|tool_call_end|>")
BARE_LIST = "["


def _read(tag: str, scanner: Scanner, output: Output) -> Steps[bool]:
    is_bare = tag == BARE_LIST
    if not is_bare:
        yield from scanner.blanks()
        yield from scanner.accept(BARE_LIST)
    num_calls = 0
    while True:
        if (yield from scanner.blanks()) == "{":  # the model writes JSON instead
            if not (yield from read_call(scanner, output, known_only=is_bare)):
                break
        else:
            name = yield from scanner.word(NAME)
            yield from scanner.blanks()
            if scanner.at_end:
                return num_calls > 0 or not is_bare or (name != "" and output.may_become_known(name))
            if not name or (is_bare and not output.knows(name)) or not (yield from scanner.accept("(")):
                break
            yield from _arguments(scanner, output.begin_call(name))
        num_calls += 1
        yield from scanner.blanks()
        yield from scanner.accept(",")
    if num_calls or not is_bare:
        yield from scanner.accept("]")
        yield from scanner.blanks()
        yield from scanner.accept(*LIST_ENDS)
    return num_calls > 0 or not is_bare


def _arguments(scanner: Scanner, call: Call) -> Steps[None]:
    """Read `a="x", days=3)`. Values without a name are left out, because nothing says which argument they are."""
    builder = JsonBuilder(call.write)
    builder.open("{")
    while not scanner.at_end:
        char = yield from scanner.blanks()
        if (yield from scanner.accept(")")):
            builder.close()
            return
        key = yield from scanner.word(NAME)
        yield from scanner.blanks()
        if key and (yield from scanner.accept("=")):
            builder.scalar(JsonBuilder.quote(key))
            yield from read_value(scanner, builder)
        elif char in ("'", '"', "[", "{", "("):
            yield from read_value(scanner, JsonBuilder(drop))
        yield from scanner.span(TO_NEXT, drop)
        yield from scanner.accept(",")


def read_value(scanner: Scanner, builder: JsonBuilder) -> Steps[None]:
    """Convert one Python literal to JSON. Commas and colons follow from the order of the items, so they are dropped."""
    depth = builder.depth
    while not scanner.at_end:
        char = yield from scanner.blanks()
        if char in BRACKETS:
            yield from scanner.take(1)
            builder.open(BRACKETS[char])
        elif char in ("'", '"'):
            yield from _read_string(scanner, builder)
        elif char in CLOSERS:
            if builder.depth == depth:
                builder.scalar("null")  # the value is missing
                return
            yield from scanner.take(1)
            builder.close()
        else:
            word = yield from scanner.word(WORD)
            if not word:
                yield from scanner.take(1)
                continue
            quote = yield from scanner.look(1)
            if quote in ("'", '"') and word.lower() in STRING_PREFIXES:
                continue
            if not scanner.at_end:  # else it may be cut off
                builder.scalar(_scalar(word))
        if builder.depth == depth:
            return


def _read_string(scanner: Scanner, builder: JsonBuilder) -> Steps[None]:
    quote = yield from scanner.look(1)
    if (yield from scanner.look(3)) == quote * 3:
        quote *= 3
    builder.begin_string()
    if (yield from read_string(scanner, builder.string, quote, PYTHON_ESCAPES)):
        builder.end_string()


def _scalar(word: str) -> str:
    """JSON text of a Python word: a number in any spelling, True, False, None, or else a string."""
    found = json_of(word, frozenset())
    if found is not None:
        return found
    for convert in (lambda text: int(text, 0), float):
        try:
            number = convert(word)
        except ValueError:
            continue
        if math.isfinite(number):
            return str(number)
    return JsonBuilder.quote(word)


PYTHONIC = ToolFormat(
    opens=("<|python_start|>", BARE_LIST),
    read=_read,
    tags=("<|python_end|>",),
    stop_tokens=("<|eom|>", "<|eot|>"),
)
LFM2 = ToolFormat(opens=("<|tool_call_start|>",), read=_read, tags=("<|tool_call_end|>",))
