"""Reads JSON as it comes: values that are passed on as they are, strings that are decoded, calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from moe_runtime.text.formats.output import Call, Output
from moe_runtime.text.formats.scanner import BLANKS, Scanner, Steps, Tags, Write, drop

REPLACEMENT = "\ufffd"
JSON_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
HEX = re.compile(r"[0-9A-Fa-f]+")
LOW_SURROGATE = re.compile(r"[dD][c-fC-F][0-9A-Fa-f]{2}")

STRUCTURE = re.compile(r'[^"{}\[\]<]*')
SCALAR = re.compile(r'[^\s"{}\[\]<,]*')
STRING_TEXT = re.compile(r'[^"\\]*')
QUOTES = {quote: Tags(quote, "\\") for quote in ('"', "'", '"' * 3, "'" * 3)}
ARGUMENTS = ("arguments", "parameters")


def pass_value(scanner: Scanner, write: Write) -> Steps[None]:
    """Pass one JSON value on as it comes.

    It ends with its last bracket. "<" outside of strings is no JSON and ends it too: it begins a closing tag.
    """
    char = yield from scanner.look(1)
    depth = 0
    if char not in ("{", "[", '"'):
        yield from scanner.span(SCALAR, write)
        return
    while char not in ("", "<"):
        if char == '"':
            yield from _pass_string(scanner, write)
        else:
            depth += 1 if char in "{[" else -1
            write((yield from scanner.take(1)))
        if depth <= 0:
            return
        yield from scanner.span(STRUCTURE, write)
        char = yield from scanner.look(1)


def _pass_string(scanner: Scanner, write: Write) -> Steps[None]:
    write((yield from scanner.take(1)))
    while True:
        yield from scanner.span(STRING_TEXT, write)
        char = yield from scanner.look(1)
        write((yield from scanner.take(2 if char == "\\" else 1)))
        if char in ("", '"'):
            return


def read_string(
    scanner: Scanner, write: Write, quote: str = '"', escapes: Mapping[str, str] = JSON_ESCAPES
) -> Steps[bool]:
    """Decode the string whose opening quote comes next, and pass its text on. False: its end is missing."""
    yield from scanner.accept(quote)
    while True:
        found = yield from scanner.until(QUOTES[quote], write)
        if found != "\\":
            return found == quote
        write((yield from read_escape(scanner, escapes)))


def read_escape(scanner: Scanner, escapes: Mapping[str, str]) -> Steps[str]:
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


class _DecodedArguments:
    """Arguments written as a JSON string: the object within it is passed on, other text stays a string."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._held: list[str] = []
        self._is_object: bool | None = None

    def write(self, text: str) -> None:
        if self._is_object is None:
            text = text.lstrip(BLANKS)
            if text:
                self._is_object = text.startswith("{")
        if self._is_object:
            self._write(text)
        else:
            self._held.append(text)

    def close(self) -> None:
        text = "".join(self._held)
        if text not in ("", "null"):
            self._write(json.dumps(text, ensure_ascii=False))


def pass_arguments(scanner: Scanner, call: Call) -> Steps[None]:
    """Pass on the arguments of a call. An object within a JSON string is decoded; null is an empty object."""
    char = yield from scanner.blanks()
    if char == '"':
        decoded = _DecodedArguments(call.write)
        if (yield from read_string(scanner, decoded.write)):
            decoded.close()
    elif char in ("{", "["):
        yield from pass_value(scanner, call.write)
    else:
        value = yield from scanner.word(SCALAR)
        if not scanner.at_end and value != "null":
            call.write(value)


def read_call(scanner: Scanner, output: Output, known_only: bool) -> Steps[bool]:
    """Read one call such as {"name": "f", "arguments": {...}}; the keys may come in any order.

    Args:
        known_only: the name must be that of a tool. For formats without a tag, where any JSON may be an answer.

    Returns:
        Whether it is a call, or may be one that is cut off. If not, some text is consumed.
    """
    yield from scanner.blanks()
    if not (yield from scanner.accept("{")):
        return scanner.at_end and not known_only
    return (yield from read_open_call(scanner, output, known_only))


def read_open_call(scanner: Scanner, output: Output, known_only: bool) -> Steps[bool]:
    """As `read_call`, after the opening brace."""
    call: Call | None = None
    early: list[str] = []
    before_name = Call({}, early.append)  # arguments that come before the name
    while (yield from scanner.blanks()) == '"':
        key = yield from _read_word(scanner)
        yield from scanner.blanks()
        if not (yield from scanner.accept(":")):
            break
        char = yield from scanner.blanks()
        if key == "name" and call is None:
            if char != '"':
                break
            name: list[str] = []
            is_whole = yield from read_string(scanner, name.append)
            if not is_whole:
                return not known_only or output.may_become_known("".join(name))
            if not name or (known_only and not output.knows("".join(name))):
                return False
            call = output.begin_call("".join(name))
            call.write("".join(early))
        elif key in ARGUMENTS and (call or before_name).is_empty:
            yield from pass_arguments(scanner, call or before_name)
        else:
            yield from pass_value(scanner, drop)
        yield from scanner.blanks()
        if not (yield from scanner.accept(",")):
            break
    yield from scanner.blanks()
    is_closed = yield from scanner.accept("}")
    if call is None:
        return scanner.at_end and not is_closed and not known_only
    if is_closed or not scanner.at_end:
        call.close()
    return True


def _read_word(scanner: Scanner) -> Steps[str]:
    pieces: list[str] = []
    yield from read_string(scanner, pieces.append)
    return "".join(pieces)


def read_calls(scanner: Scanner, output: Output) -> Steps[bool]:
    """Read a list of calls, or calls that follow each other with or without a comma or semicolon between them.

    Returns:
        As `read_call`, for the first call.
    """
    yield from scanner.blanks()
    is_list = yield from scanner.accept("[")
    if is_list and (yield from scanner.blanks()) == "]":
        yield from scanner.accept("]")
        return True
    if not (yield from read_call(scanner, output, known_only=False)):
        return False
    char = "{"
    while char == "{":
        yield from scanner.blanks()
        yield from scanner.accept(",", ";")
        char = yield from scanner.blanks()
        if char == "{":
            yield from read_call(scanner, output, known_only=False)  # an object that is no call is dropped
    if is_list:
        yield from scanner.accept("]")
    return True
