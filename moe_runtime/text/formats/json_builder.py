"""Writes JSON piece by piece, from the values of a looser language."""

from __future__ import annotations

import json
from dataclasses import dataclass

from moe_runtime.text.formats.scanner import Write


@dataclass
class _Level:
    bracket: str
    num_items: int = 0
    wants_value: bool = False  # in an object: after a key


class JsonBuilder:
    """Writes one JSON value; it is valid JSON whatever it is told.

    Commas and colons follow from the order of the items: in an object, keys and values alternate.

    Attributes:
        has_source: some text was no value of the looser language, and became a string.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._levels: list[_Level] = []
        self.has_source = False

    @property
    def depth(self) -> int:
        """Number of open lists and objects."""
        return len(self._levels)

    @property
    def wants_value(self) -> bool:
        """Whether a key waits for its value."""
        return bool(self._levels) and self._levels[-1].wants_value

    @property
    def wants_key(self) -> bool:
        return bool(self._levels) and self._levels[-1].bracket == "{" and not self._levels[-1].wants_value

    @staticmethod
    def quote(text: str) -> str:
        """A text as a JSON string."""
        return json.dumps(text, ensure_ascii=False)

    def open(self, bracket: str) -> None:
        """Begin a list or an object."""
        if self.wants_key:  # no list can be a key
            self.scalar('""')
        self._begin_item()
        self._write(bracket)
        self._levels.append(_Level(bracket))

    def close(self) -> None:
        """End the innermost list or object."""
        if self._levels[-1].wants_value:
            self.scalar("null")
        self._write("}" if self._levels.pop().bracket == "{" else "]")
        self._end_item()

    def scalar(self, text: str) -> None:
        """A whole value as JSON text. It becomes a string if it is a key."""
        if self.wants_key and not text.startswith('"'):
            text = self.quote(text)
        self._begin_item()
        self._write(text)
        self._end_item()

    def source(self, text: str) -> None:
        """A text that is no value of the looser language; it becomes a string."""
        self.has_source = True
        self.scalar(self.quote(text))

    def begin_string(self) -> None:
        self._begin_item()
        self._write('"')

    def string(self, piece: str) -> None:
        """The next piece of a string's text."""
        self._write(self.quote(piece)[1:-1])

    def end_string(self) -> None:
        self._write('"')
        self._end_item()

    def _begin_item(self) -> None:
        if self._levels and not self._levels[-1].wants_value:
            if self._levels[-1].num_items:
                self._write(", ")
            self._levels[-1].num_items += 1

    def _end_item(self) -> None:
        if self._levels and self._levels[-1].bracket == "{":
            level = self._levels[-1]
            level.wants_value = not level.wants_value
            if level.wants_value:
                self._write(": ")
