"""Reads JSON as it comes: values that are passed on as they are, and strings that are decoded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from moe_runtime.text.formats.json_kinds import PYTHON_SPELLINGS
from moe_runtime.text.formats.scanner import Scanner, Steps, Tags, Write

ReadEscape = Callable[[Scanner], Steps[str]]
REPLACEMENT = "\ufffd"
JSON_ESCAPES: Mapping[str, str] = {
    '"': '"',
    "\\": "\\",
    "/": "/",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
}
HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
HEX = re.compile(r"[0-9A-Fa-f]+")
LOW_SURROGATE = re.compile(r"[dD][c-fC-F][0-9A-Fa-f]{2}")

STRUCTURE = re.compile(r'[^"{}\[\]<A-Za-z]*')
WORD = re.compile(r"[A-Za-z]*")
CONTROL = re.compile(r"[\x00-\x1f]")
SCALAR = re.compile(r'[^\s"{}\[\]<,]*')
STRING_TEXT = re.compile(r'[^"\\]*')
QUOTES = {quote: Tags(quote, "\\") for quote in ('"', "'", '"' * 3, "'" * 3)}


def pass_value(scanner: Scanner, write: Write) -> Steps[None]:
    """Pass one JSON value on as it comes.

    It ends with its last bracket. "<" outside of strings is no JSON and ends it too: it begins a closing tag. Control
    characters in strings are escaped, and so are backslashes that begin no escape. True, False and None are read too.
    """
    char = yield from scanner.look(1)
    if char in ("{", "[", '"'):
        yield from pass_open_value(scanner, write, depth=0)
    else:
        yield from scanner.span(SCALAR, write)


def pass_open_value(scanner: Scanner, write: Write, depth: int) -> Steps[None]:
    """As `pass_value`, where `depth` brackets are open already."""
    while (char := (yield from scanner.look(1))) not in ("", "<"):
        if char == '"':
            yield from _pass_string(scanner, write)
        elif char in "{}[]":
            depth += 1 if char in "{[" else -1
            write((yield from scanner.take(1)))
        else:
            word = yield from scanner.word(WORD)
            if scanner.at_end:  # it may be cut off
                return
            write(PYTHON_SPELLINGS.get(word, word))
        if depth <= 0:
            return
        yield from scanner.span(STRUCTURE, write)


def _pass_string(scanner: Scanner, write: Write) -> Steps[None]:
    def write_text(text: str) -> None:
        write(CONTROL.sub(lambda found: json.dumps(found.group())[1:-1], text))

    write((yield from scanner.take(1)))
    while True:
        yield from scanner.span(STRING_TEXT, write_text)
        char = yield from scanner.take(1)
        if char != "\\":
            write(char)
            return
        escaped = yield from scanner.take(1)
        if escaped == "u":
            digits = yield from scanner.look(4)
            if len(digits) < 4:  # cut off
                yield from scanner.take(4)
                return
            write("\\u" if HEX.fullmatch(digits) else "\\\\u")
        elif escaped == "'":  # an escape of Python
            write(escaped)
        elif escaped:
            write("\\" if escaped in JSON_ESCAPES else "\\\\")
            write_text(escaped)


def read_string(scanner: Scanner, write: Write, quote: str = '"', escape: ReadEscape | None = None) -> Steps[bool]:
    """Decode the string whose opening quote comes next, and pass its text on. False: its end is missing.

    Args:
        escape: reads what follows a backslash; by default, an escape of JSON.
    """
    yield from scanner.accept(quote)
    while True:
        found = yield from scanner.until(QUOTES[quote], write, release=False)
        if found != "\\":
            return found == quote
        write((yield from (escape or read_escape)(scanner)))


def read_escape(scanner: Scanner, escapes: Mapping[str, str] = JSON_ESCAPES) -> Steps[str]:
    """The text of an escape, after its backslash. An unknown one stays as it is."""
    char = yield from scanner.take(1)
    if char in escapes:
        return escapes[char]
    if not char:
        return ""
    num_digits = HEX_DIGITS.get(char, 0)
    digits = yield from scanner.look(num_digits)
    if len(digits) < num_digits:  # cut off
        yield from scanner.take(len(digits))
        return ""
    if not HEX.fullmatch(digits):
        return "\\" + char
    yield from scanner.take(num_digits)
    code = int(digits, 16)
    if 0xD800 <= code < 0xDC00 and (yield from scanner.accept("\\u")):
        low = yield from scanner.look(4)
        if LOW_SURROGATE.fullmatch(low):
            yield from scanner.take(4)
            return chr(0x10000 + (code - 0xD800) * 0x400 + int(low, 16) - 0xDC00)
        yield from scanner.take(len(low) if HEX.fullmatch(low) else 0)
        return REPLACEMENT * 2  # neither half stands for a character
    return REPLACEMENT if 0xD800 <= code < 0xE000 or code > 0x10FFFF else chr(code)
