"""Converts Python's literals to JSON as they come. Nothing is evaluated.

A value that is no literal (`10**30`, `g(1)`) becomes a string with its source text. Strings and collections are passed
on as they come, so what follows them in an expression cannot change them any more: `"a" + b` is the string "a + b", and
of `[1] + b` the list stays. Strings that are added or follow each other are joined.
"""

from __future__ import annotations

import math
import re
import unicodedata

from moe_runtime.text.formats.json_builder import JsonBuilder
from moe_runtime.text.formats.json_kinds import PYTHON_SPELLINGS, kind_of_text
from moe_runtime.text.formats.json_text import JSON_ESCAPES, QUOTES, read_escape, read_string
from moe_runtime.text.formats.scanner import BLANK_RUN, Scanner, Steps, Write

PYTHON_ESCAPES = {**JSON_ESCAPES, "'": "'", "\n": "", "a": "\a", "v": "\v"}
PYTHON_ESCAPES.pop("/")
OCTAL = re.compile(r"[0-7]{1,3}")
CHARACTER_NAME = re.compile(r"[A-Za-z0-9 \-]*")  # within \N{...}
STRING_PREFIX = re.compile(r"[rbuRBU]{0,2}")
STRING_BEGIN = re.compile(r"(?P<prefix>[rbuRBU]{0,2})(?P<quote>[\"'])")
PLAIN_SOURCE = re.compile(r"""[^()\[\]{}"',:]*""")
CLOSERS = (")", "]", "}")
BRACKETS = {"(": "[", "[": "[", "{": "{"}


def read_value(scanner: Scanner, builder: JsonBuilder) -> Steps[None]:
    """Convert one value. Commas and colons follow from the order of the items, so they are dropped."""
    depth = builder.depth
    while not scanner.at_end:
        char = yield from scanner.blanks()
        if char in BRACKETS:
            yield from scanner.take(1)
            yield from _open(scanner, builder, char)
        elif char in CLOSERS:
            if builder.depth == depth:
                builder.scalar("null")  # the value is missing
                return
            yield from scanner.take(1)
            builder.close()
        elif char in (",", ":"):
            if builder.depth == depth:
                builder.scalar("null")
                return
            yield from scanner.take(1)
        elif (yield from _begins_string(scanner)):
            yield from _read_strings(scanner, builder)
        else:
            yield from _read_source(scanner, builder, builder.wants_key, is_argument=builder.depth == depth)
        if builder.depth == depth:
            return


def pass_source(scanner: Scanner, write: Write) -> Steps[None]:
    """Pass the source of an expression on, up to a comma, a colon or a closing bracket that is not within brackets."""
    depth = 0
    last = ""

    def note(text: str) -> None:
        nonlocal last
        last = text[-1:] or last
        write(text)

    while not scanner.at_end:
        yield from scanner.span(PLAIN_SOURCE, note)
        char = yield from scanner.look(1)
        if char in ("'", '"') and not (last.isalnum() or last == "_"):  # an apostrophe within a word is none
            yield from _pass_quoted(scanner, note)
        elif char:
            if depth == 0 and char in (",", ":", *CLOSERS):
                return
            depth += 1 if char in BRACKETS else -1 if char in CLOSERS else 0
            note((yield from scanner.take(1)))


def literal_json(text: str) -> str | None:
    """JSON of a whole text that is a list, a tuple, a set or a dict of literals; None if it is none."""
    scanner, found = Scanner(), list[str]()
    scanner.feed(text)
    scanner.end()
    builder = JsonBuilder(found.append)
    next(read_value(scanner, builder), None)
    return "".join(found) if scanner.at_end and not builder.depth and not builder.has_source else None


def _open(scanner: Scanner, builder: JsonBuilder, bracket: str) -> Steps[None]:
    """Begin a list or an object. After a brace, what follows the first item shows whether it is a set."""
    first: list[str] = []
    if bracket == "{" and (yield from scanner.blanks()) not in (*BRACKETS, *CLOSERS):
        item = JsonBuilder(first.append)
        if (yield from _begins_string(scanner)):
            yield from _read_strings(scanner, item)
        else:
            yield from _read_source(scanner, item, is_key=True, is_argument=False)
        following = yield from scanner.blanks()
        if not following:  # cut off
            return
        bracket = "{" if following == ":" else "["
    builder.open(BRACKETS[bracket])
    if first:
        builder.scalar("".join(first))


def _begins_string(scanner: Scanner) -> Steps[bool]:
    ahead = yield from scanner.look(3)
    return STRING_BEGIN.match(ahead) is not None


def _read_strings(scanner: Scanner, builder: JsonBuilder) -> Steps[None]:
    """Convert a string, those that follow it or are added to it, and the source that follows these."""
    builder.begin_string()
    while True:
        if not (yield from _read_string(scanner, builder.string)):
            return
        blanks = yield from scanner.word(BLANK_RUN)
        if (yield from scanner.accept("+")):
            blanks += "+" + (yield from scanner.word(BLANK_RUN))
        if not (yield from _begins_string(scanner)):
            break
    ahead = yield from scanner.look(3)
    if len(ahead) < 3 and STRING_PREFIX.fullmatch(ahead):  # cut off
        yield from scanner.take(3)
    elif ahead[0] not in (",", ":", *CLOSERS):
        builder.has_source = True
        builder.string(blanks)
        yield from pass_source(scanner, builder.string)
    if not scanner.at_end:
        builder.end_string()


def _read_string(scanner: Scanner, write: Write) -> Steps[bool]:
    """Decode one string and pass its text on. False: its end is missing."""
    found = STRING_BEGIN.match((yield from scanner.look(3)))
    assert found is not None
    prefix, quote = found["prefix"].lower(), found["quote"]
    yield from scanner.take(len(prefix))
    if (yield from scanner.look(3)) == quote * 3:
        quote *= 3
    return (yield from read_string(scanner, write, quote, _raw_escape if "r" in prefix else _python_escape))


def _raw_escape(scanner: Scanner) -> Steps[str]:
    char = yield from scanner.take(1)
    return "\\" + char if char else ""


def _python_escape(scanner: Scanner) -> Steps[str]:
    ahead = yield from scanner.look(3)
    if octal := OCTAL.match(ahead):
        yield from scanner.take(octal.end())
        return chr(int(octal.group(), 8)) if octal.end() == 3 or len(ahead) > octal.end() else ""  # else cut off
    if ahead.startswith("N{") or ahead == "N":
        yield from scanner.take(2)
        name = yield from scanner.word(CHARACTER_NAME)
        end = yield from scanner.accept("}")
        if not end and scanner.at_end:
            return ""
        try:
            return unicodedata.lookup(name if end else "")
        except KeyError:
            return "\\N{" + name + end
    return (yield from read_escape(scanner, PYTHON_ESCAPES))


def _pass_quoted(scanner: Scanner, write: Write) -> Steps[None]:
    """Pass a string literal on as it is."""
    quote = yield from scanner.look(1)
    if (yield from scanner.look(3)) == quote * 3:
        quote *= 3
    write((yield from scanner.take(len(quote))))
    while (found := (yield from scanner.until(QUOTES[quote], write))) == "\\":
        write(found + (yield from scanner.take(1)))
    write(found)


def _read_source(scanner: Scanner, builder: JsonBuilder, is_key: bool, is_argument: bool) -> Steps[None]:
    """Convert a number, a word, or an expression, which stays its source.

    Args:
        is_key: a colon ends it.
        is_argument: no digit can follow a comma, so in `1,000` the comma is part of the value.
    """
    pieces: list[str] = []
    while True:
        yield from pass_source(scanner, pieces.append)
        following = yield from scanner.look(2)
        if not following or (following == "," and is_argument):  # it may be cut off
            return
        is_within = following[1:].isdigit() if following[0] == "," and is_argument else following[0] == ":"
        if is_key or not is_within:
            break
        pieces.append((yield from scanner.take(1)))
    source = "".join(pieces).strip()
    found = _scalar(source)
    if found is None:
        builder.source(source)
    else:
        builder.scalar(found)


def _scalar(source: str) -> str | None:
    """JSON text of a Python word: a number in any spelling, True, False, None. None if it is something else."""
    source = PYTHON_SPELLINGS.get(source, source)
    if kind_of_text(source) is not None:
        return source
    for convert in (lambda text: int(text, 0), float):
        try:
            number = convert(source)
            if math.isfinite(number):
                return str(number)
        except (ValueError, OverflowError):
            continue
    return None
