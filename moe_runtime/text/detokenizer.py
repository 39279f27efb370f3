"""Turns tokens into text, one at a time. It releases whole characters only, and no text that a stop string may cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from itertools import islice

REPLACEMENT = "\ufffd"  # decoders return it for an incomplete character
CONTEXT_TOKENS = 6  # tokens decoded before the new ones, so that spaces between words are right

Decode = Callable[[list[int]], str]


class IncrementalDecoder:
    """Decodes a growing sequence of tokens.

    A token's text depends on its neighbours (a word's leading space, a character split over tokens). So a window of
    tokens is decoded with and without the new ones, and the difference is their text. While it ends in an incomplete
    character, it is held back.

    Args:
        decode: turns token ids into text.
        context: the tokens before the first new one; their text is not returned.
        hidden: ids that add no text (special tokens). They are left out of the window, so that it stays short.
    """

    def __init__(self, decode: Decode, context: Sequence[int], hidden: Set[int] = frozenset()) -> None:
        self._decode = decode
        self._hidden = hidden
        self._known, self._known_text = self._context(context)
        self._held: list[int] = []

    def _context(self, context: Sequence[int]) -> tuple[list[int], str]:
        """The last visible tokens of `context` and their text, starting at the first byte of a character. A character
        has at most four bytes."""
        shown = list(islice((token for token in reversed(context) if token not in self._hidden), CONTEXT_TOKENS + 3))[
            ::-1
        ]
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + 4):
            known = shown[-count:]
            text = self._decode(known)
            if not text.startswith(REPLACEMENT):
                break
        return known, text

    def append(self, token_id: int) -> str:
        """Add a token. Returns the text that can no longer change."""
        if token_id in self._hidden:
            return ""
        self._held.append(token_id)
        text = self._decode(self._known + self._held)
        return "" if text.endswith(REPLACEMENT) else self._advance(text)

    def flush(self) -> str:
        """The text that is still held back. Call it if no token follows."""
        return self._advance(self._decode(self._known + self._held)) if self._held else ""

    def _advance(self, text: str) -> str:
        known_text = self._known_text
        if not text.startswith(known_text):  # it ended in an incomplete character, which is now complete
            known_text = known_text.rstrip(REPLACEMENT)
        new_text = text[len(known_text) :]
        if not new_text:
            return ""
        self._known, self._held = self._held, []
        self._known_text = self._decode(self._known)
        return new_text


class OutputText:
    """A request's output text: ended by stop strings, and released piece by piece.

    Args:
        decoder: decodes the tokens.
        stop: strings that end the text. It is cut before the stop string that is complete first, or after it with
            `include_stop`.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: Sequence[str], include_stop: bool) -> None:
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._longest_stop = max(map(len, stop), default=0)
        self._released = 0
        self.text = ""

    def append(self, token_id: int | None, last: bool) -> str | None:
        """Add a token (None adds none). `last`: no more tokens follow. Returns the stop string that ended the text."""
        new_text = self._decoder.append(token_id) if token_id is not None else ""
        if last:
            new_text += self._decoder.flush()
        searched = len(self.text)
        self.text += new_text
        return self._cut_at_stop(max(0, searched - self._longest_stop + 1)) if new_text else None

    def _cut_at_stop(self, start: int) -> str | None:
        found = [(index + len(stop), index, stop) for stop in self._stop if (index := self.text.find(stop, start)) >= 0]
        if not found:
            return None
        end, index, stop = min(found)
        self.text = self.text[: end if self._include_stop else index]
        return stop

    def release(self, finished: bool) -> str:
        """The new text since the last call, without an end that may still be cut."""
        end = len(self.text) if finished or self._include_stop else len(self.text) - self._num_withheld()
        released = self.text[self._released : end]
        self._released = end
        return released

    def _num_withheld(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0
