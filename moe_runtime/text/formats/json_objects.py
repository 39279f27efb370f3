"""Reads calls that are JSON objects, such as {"name": "f", "arguments": {...}}."""

from __future__ import annotations

import json
import re

from moe_runtime.text.formats.json_kinds import NULLS
from moe_runtime.text.formats.json_text import SCALAR, pass_open_value, pass_value, read_string
from moe_runtime.text.formats.output import Call, Output
from moe_runtime.text.formats.scanner import BLANKS, Scanner, Steps, Write, drop

ARGUMENTS = ("arguments", "parameters")
EXTRA_CLOSERS = re.compile(r"[ \t\r\n}\]]*")
FENCE = "```"
FENCE_NAME = re.compile(r"\w*")


class _DecodedArguments:
    """Arguments written as a JSON string: the object within it is passed on, other text stays a string."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._held: list[str] = []
        self._is_object: bool | None = None
        self._scanner = Scanner()
        self._steps = pass_value(self._scanner, write)
        self._is_read = False

    def write(self, text: str) -> None:
        if self._is_object is None:
            text = text.lstrip(BLANKS)
            if text:
                self._is_object = text.startswith("{")
        if not self._is_object:
            self._held.append(text)
        elif not self._is_read:
            self._scanner.feed(text)
            self._is_read = next(self._steps, True) is True

    def close(self) -> None:
        text = "".join(self._held)
        if text not in ("", *NULLS):
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
        if not scanner.at_end and value not in NULLS:
            call.write(value)


def read_call(scanner: Scanner, output: Output, known_only: bool) -> Steps[bool]:
    """Read one call; its keys may come in any order. OpenAI's form, with name and arguments in "function", is read too.

    Args:
        known_only: the name must be that of a tool. For formats without a tag, where any JSON may be an answer.

    Returns:
        Whether it is a call, or may be one that is cut off. If not, some text is consumed.
    """
    yield from scanner.blanks()
    if not (yield from scanner.accept("{")):
        return scanner.at_end and not known_only
    return (yield from read_open_call(scanner, output, known_only))


def read_open_call(scanner: Scanner, output: Output, known_only: bool, is_inner: bool = False) -> Steps[bool]:
    """As `read_call`, after the opening brace. `is_inner`: within "function"."""
    call: Call | None = None
    has_inner = False
    early: list[str] = []
    before_name = Call({}, early.append)  # arguments that come before the name
    while (yield from scanner.blanks()) == '"':
        key = yield from _read_word(scanner)
        yield from scanner.blanks()
        if not (yield from scanner.accept(":")):
            break
        char = yield from scanner.blanks()
        if key == "name" and char == '"' and call is None:
            name: list[str] = []
            is_whole = yield from read_string(scanner, name.append)
            if not is_whole:
                return not known_only or output.may_become_known("".join(name))
            if not name or (known_only and not output.knows("".join(name))):
                yield from pass_open_value(scanner, drop, depth=1)  # another object, whose parts are no calls either
                return False
            call = output.begin_call("".join(name))
            call.write("".join(early))
        elif key == "function" and char == "{" and call is None and not is_inner:
            yield from scanner.take(1)
            has_inner = yield from read_open_call(scanner, output, known_only, is_inner=True)
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
        return has_inner or (scanner.at_end and not is_closed and not known_only)
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


def read_block(scanner: Scanner, output: Output, *closes: str) -> Steps[bool]:
    """Read calls up to a closing tag, which may be missing. There may be a fence around them, or too many brackets.

    Returns:
        As `read_call`, for the first call.
    """
    yield from scanner.blanks()
    is_fenced = yield from scanner.accept(FENCE)
    if is_fenced:
        yield from scanner.span(FENCE_NAME, drop)
    if not (yield from read_calls(scanner, output)):
        return False
    yield from scanner.span(EXTRA_CLOSERS, drop)
    if is_fenced and (yield from scanner.accept(FENCE)):
        yield from scanner.blanks()
    yield from scanner.accept(*closes)
    return True


def read_known_calls(scanner: Scanner, output: Output) -> Steps[bool]:
    """Read a list of calls of given tools, after its opening bracket. What follows the last call stays text.

    Returns:
        Whether text that is kept since the last call is no text.
    """
    has_call = False
    while (yield from scanner.blanks()) == "{":
        if not (yield from read_call(scanner, output, known_only=True)):
            return False
        has_call = True
        yield from scanner.blanks()
        yield from scanner.accept(",", ";")
        yield from scanner.blanks()
        scanner.keep()
    if has_call:
        yield from scanner.accept("]")
    return has_call
