"""Turns tokens into text, one at a time. It releases whole characters only, and no text that a stop string may cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import lru_cache
from itertools import islice

REPLACEMENT = "\ufffd"  # decoders return one for an incomplete character
CONTEXT_TOKENS = 6  # tokens decoded before the new ones, so that spaces between words are right
MAX_WINDOW = 16  # tokens decoded at a time

Decode = Callable[[list[int]], str]


class IncrementalDecoder:
    """Decodes a growing sequence of tokens. The work for a token does not depend on the number of tokens before it.

    A token's text depends on its neighbours (a word's leading space, a character split over tokens). So a window of the
    last tokens is decoded, and what follows the text released before is new. An incomplete character at the end is held
    back until it is complete, or cannot become complete.

    Args:
        decode: turns token ids into text. A token may complete the last character, but changes no text before it.
        context: the tokens before the first new one; their text is not returned.
        hidden: ids that add no text (special tokens). They are left out of the window.
    """

    def __init__(self, decode: Decode, context: Sequence[int], hidden: Set[int] = frozenset()) -> None:
        self._decode = decode
        self._hidden = hidden
        last = list(islice((token for token in reversed(context) if token not in hidden), CONTEXT_TOKENS + 3))
        self._window, self._released = self._context(last[::-1])

    def _context(self, tokens: list[int]) -> tuple[list[int], str]:
        """The last of `tokens` and their text, starting at the first byte of a character. A character has at most four
        bytes."""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + 4):
            window = tokens[-count:]
            text = self._decode(window)
            if not text.startswith(REPLACEMENT):
                break
        return window, text

    def append(self, token_id: int) -> str:
        """Add a token. Returns the text that can no longer change."""
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        return self._release(text, len(text) - text.endswith(REPLACEMENT))

    def flush(self) -> str:
        """The text that is still held back. Call it if no token follows."""
        text = self._decode(self._window)
        return self._release(text, len(text))

    def _release(self, text: str, end: int) -> str:
        """The new part of the window's text up to `end`."""
        known = self._released
        if not text.startswith(known):  # it ended in an incomplete character, which is now complete
            known = known.removesuffix(REPLACEMENT)
        new_text = text[len(known) : end]
        self._released = text[: max(end, len(known))]
        if len(self._window) > MAX_WINDOW:
            self._window, decoded = self._context(self._window[-CONTEXT_TOKENS - 3 :])
            self._released = decoded[: len(decoded) - (len(text) - len(self._released))]
        return new_text


class StopMatcher:
    """Finds the first end of a stop string in text that comes in pieces (Knuth, Morris, Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0  # length of the longest end of the text so far that begins the stop string
        self._borders = _borders(stop)

    def append(self, text: str) -> int | None:
        """Add text. Returns the number of its characters up to the end of the stop string, if that is complete."""
        matched = self.num_matched
        for index, character in enumerate(text):
            while matched and character != self.stop[matched]:
                matched = self._borders[matched - 1]
            matched += character == self.stop[matched]
            if matched == len(self.stop):
                return index + 1
        self.num_matched = matched
        return None


@lru_cache(maxsize=1024)
def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of its longest proper beginning that is also its end."""
    borders, matched = [0], 0
    for character in stop[1:]:
        while matched and character != stop[matched]:
            matched = borders[matched - 1]
        matched += character == stop[matched]
        borders.append(matched)
    return borders


class OutputText:
    """A request's output text: ended by stop strings, and released piece by piece.

    Args:
        decoder: decodes the tokens.
        stop: strings that end the text. It is cut before the stop string that is complete first, or after it with
            `include_stop`.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: Sequence[str], include_stop: bool) -> None:
        self._decoder = decoder
        self._matchers = [StopMatcher(text) for text in stop]
        self._include_stop = include_stop
        self._pending = ""  # not yet released

    def append(self, token_id: int | None, last: bool, may_stop: bool = True) -> str | None:
        """Add a token (None adds none). Returns the stop string that ended the text.

        Args:
            last: no more tokens follow.
            may_stop: whether a stop string may begin in this token's text.
        """
        new_text = self._decoder.append(token_id) if token_id is not None else ""
        if last:
            new_text += self._decoder.flush()
        self._pending += new_text
        if not new_text or not may_stop:
            return None
        ends = [
            (end, -len(matcher.stop), matcher.stop) for matcher in self._matchers if (end := matcher.append(new_text))
        ]
        if not ends:
            return None
        end, _, stop = min(ends)
        kept = len(self._pending) - len(new_text) + end
        self._pending = self._pending[: kept if self._include_stop else kept - len(stop)]
        return stop

    def release(self, finished: bool) -> str:
        """The new text since the last call, without an end that may still be cut."""
        withheld = 0
        if not finished and not self._include_stop:
            withheld = max((matcher.num_matched for matcher in self._matchers), default=0)
        end = len(self._pending) - withheld
        released, self._pending = self._pending[:end], self._pending[end:]
        return released
