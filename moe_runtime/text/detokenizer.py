"""From tokens to text, one token at a time: whole characters only, and nothing shown that a stop string takes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from itertools import islice

REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are no whole character
CONTEXT_TOKENS = 6  # tokens decoded before the new ones, so that spaces between words come out right

Decode = Callable[[list[int]], str]


class IncrementalDecoder:
    """Decodes a growing sequence of tokens.

    A token's text depends on its neighbours (a word's leading space, a character split over tokens), so a window of
    tokens is decoded with and without the new ones, and the difference is what they add. As long as that ends in half
    a character it is held back.

    Args:
        decode: token ids to text.
        context: the tokens before the first new one, of which no text is given.
        hidden: ids that add no text (special tokens); they are left out of the window, which so stays short.
    """

    def __init__(self, decode: Decode, context: Sequence[int], hidden: Set[int] = frozenset()) -> None:
        self._decode = decode
        self._hidden = hidden
        self._known, self._known_text = self._context(context)
        self._held: list[int] = []

    def _context(self, context: Sequence[int]) -> tuple[list[int], str]:
        """The last tokens of `context` that are shown, and their text, from where a character begins: it has four bytes
        at most."""
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
        """The text that has become certain with this token."""
        if token_id in self._hidden:
            return ""
        self._held.append(token_id)
        text = self._decode(self._known + self._held)
        return "" if text.endswith(REPLACEMENT) else self._advance(text)

    def flush(self) -> str:
        """The text that is still held back, when no token follows."""
        return self._advance(self._decode(self._known + self._held)) if self._held else ""

    def _advance(self, text: str) -> str:
        known_text = self._known_text
        if not text.startswith(known_text):  # it ended in half a character, which is whole now
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
        decoder: gives the text of the tokens.
        stop: strings that end the text; it is cut before the one that is complete first, after it if `include_stop`.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: Sequence[str], include_stop: bool) -> None:
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._longest_stop = max(map(len, stop), default=0)
        self._released = 0
        self.text = ""

    def append(self, token_id: int | None, last: bool) -> str | None:
        """Add a token (None adds none); `last`: no more follow. Returns the stop string that ended the text."""
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
        """The text since the last call, without a tail that may yet be cut off."""
        end = len(self.text) if finished or self._include_stop else len(self.text) - self._num_withheld()
        released = self.text[self._released : end]
        self._released = end
        return released

    def _num_withheld(self) -> int:
        """Length of the longest tail that is the beginning of a stop string."""
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0
