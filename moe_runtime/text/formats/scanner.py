"""Reads text that arrives in pieces.

A format is written as a generator that reads from a `Scanner`. It yields where it needs more text, and goes on there
once more has come. What it reads never depends on where the text was cut. Text is consumed as soon as its meaning is
known, so the work is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields where it needs more text
Write = Callable[[str], object]

BLANKS = " \t\r\n"
NEVER = "(?!)"  # a pattern that matches nothing
MAX_BLANKS = 64  # between two tags that belong together
BLANK_RUN = re.compile(r"[ \t\r\n]*")


def drop(text: str) -> None:
    """Takes text that nobody needs."""


def overlap(tags: Sequence[str]) -> bool:
    """Whether a tag is within another one, but not at its end: then text could match the one before the other."""
    return any(one in other[:-1] for one in tags for other in tags if one != other)


class Tags:
    """Texts to look for. A text may be within another one only at its end, so that the first match is always right."""

    def __init__(self, *tags: str) -> None:
        assert not overlap(tags), tags
        self._longest = max(map(len, tags), default=0)
        self._whole = re.compile("|".join(map(re.escape, tags)) or NEVER)
        self._begun = re.compile("(?:" + ("|".join(map(_beginnings, tags)) or NEVER) + r")\Z")

    def find(self, text: str, start: int) -> re.Match[str] | None:
        return self._whole.search(text, start)

    def begun_at(self, text: str, start: int) -> int:
        """Where the end of the text may be the beginning of a tag; its length if it is none."""
        begun = self._begun.search(text, max(start, len(text) - self._longest + 1))
        return begun.start() if begun else len(text)


def _beginnings(tag: str) -> str:
    """A pattern for all beginnings of a tag that are at least one character long, without the whole tag."""
    pattern = ""
    for char in reversed(tag[:-1]):
        pattern = re.escape(char) + (f"(?:{pattern})?" if pattern else "")
    return pattern or NEVER


class Scanner:
    """Text as it comes, with a position.

    Its methods that are generators wait for text that they need.

    Attributes:
        ended: no more text follows. A reader sees this only if it has waited for text up to the end.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self.ended = False
        self._kept: list[str] | None = None

    def feed(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """No more text follows."""
        self.ended = True

    @property
    def at_end(self) -> bool:
        """Whether all text is consumed and no more follows."""
        return self.ended and self._at == len(self._text)

    def keep(self, begin: str = "") -> None:
        """Keep the text that is consumed from here on, after `begin`, in place of what was kept before."""
        self._kept = [begin]

    def kept(self) -> str:
        """The text since `keep`; ends keeping."""
        pieces, self._kept = self._kept or [], None
        return "".join(pieces)

    def _consume(self, end: int) -> str:
        text = self._text[self._at : end]
        if self._kept is not None:
            self._kept.append(text)
        self._at = end
        return text

    def until(self, tags: Tags, write: Write, release: bool = True) -> Steps[str]:
        """Pass text on up to the first tag. Returns the tag, which is consumed, or "" at the end of the text.

        Args:
            release: if the text ends in the beginning of a tag, pass that on; else it is dropped.
        """
        while True:
            found = tags.find(self._text, self._at)
            end = found.start() if found else tags.begun_at(self._text, self._at)
            if end > self._at:
                write(self._consume(end))
            if found:
                return self._consume(found.end())
            if self.ended:
                rest = self._consume(len(self._text))
                if rest and release:
                    write(rest)
                return ""
            yield

    def look(self, count: int) -> Steps[str]:
        """The next characters, fewer only at the end of the text. They are not consumed."""
        while len(self._text) - self._at < count and not self.ended:
            yield
        return self._text[self._at : self._at + count]

    def take(self, count: int) -> Steps[str]:
        """Consume the next characters, fewer only at the end of the text."""
        found = yield from self.look(count)
        return self._consume(self._at + len(found))

    def accept(self, *words: str) -> Steps[str]:
        """Consume the longest of the words that comes next. Returns it, or "" if none does."""
        longest = max(map(len, words))
        while True:
            rest = self._text[self._at : self._at + longest]
            if self.ended or not any(len(word) > len(rest) and word.startswith(rest) for word in words):
                found = max((word for word in words if rest.startswith(word)), key=len, default="")
                return self._consume(self._at + len(found))
            yield

    def comes(self, *words: str) -> Steps[bool]:
        """Whether one of the words comes next, after `MAX_BLANKS` blanks at most. Nothing is consumed.

        At the end of the text, nothing at all and the beginning of a word count too.
        """
        count = MAX_BLANKS + max(map(len, words))
        while True:
            ahead = self._text[self._at : self._at + count]
            rest = ahead.lstrip(BLANKS)
            if rest.startswith(words):
                return True
            if len(ahead) == count or not any(word.startswith(rest) for word in words):
                return False
            if self.ended:
                return True
            yield

    def span(self, run: re.Pattern[str], write: Write) -> Steps[None]:
        """Pass the characters on that match `run`, which is a pattern of one character class with a star."""
        while True:
            found = run.match(self._text, self._at)
            assert found is not None
            if found.end() > self._at:
                write(self._consume(found.end()))
            if self._at < len(self._text) or self.ended:
                return
            yield

    def word(self, run: re.Pattern[str]) -> Steps[str]:
        """The characters that match `run`, together."""
        pieces: list[str] = []
        yield from self.span(run, pieces.append)
        return "".join(pieces)

    def blanks(self) -> Steps[str]:
        """Consume blanks and look at the character after them ("" at the end of the text)."""
        yield from self.span(BLANK_RUN, drop)
        char = yield from self.look(1)
        return char
