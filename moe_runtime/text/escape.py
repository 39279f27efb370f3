"""Texts of control tokens that a client sends, as plain text.

Otherwise a user's "<|im_end|>" would end the user's turn. A mark within each such text tells it from the template's own
control tokens once the prompt is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

MARK = "\ufdd0"  # a code point that Unicode keeps free for a program's own use

Encode = Callable[[str], list[int]]


class ControlTexts:
    """Marks texts of control tokens, and encodes a rendered prompt that holds marked ones.

    Args:
        tokens: texts of all control tokens.
    """

    def __init__(self, tokens: Collection[str]) -> None:
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def mark(self, value: Any) -> Any:
        """A copy of messages or tools in which control texts are marked, in keys too."""
        if isinstance(value, str):
            return self._pattern.sub(_marked, value.replace(MARK, ""))
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    def encode(self, text: str, encode: Encode, encode_plain: Callable[[str, bool], list[int]]) -> list[int]:
        """Token ids of a rendered prompt.

        Text with a mark, from the control token before it to the one after it, is encoded as plain text. All other
        text is encoded together, as without marks.

        Args:
            encode: encodes text with control tokens.
            encode_plain: encodes text without; its flag says whether the prompt begins with this text.
        """
        token_ids: list[int] = []
        begin = 0  # of what is not yet encoded
        end = 0  # of the last control token
        for found in [*self._pattern.finditer(text), None]:
            next_begin = found.start() if found else len(text)
            plain = text[end:next_begin]
            if MARK in plain:
                token_ids += encode(text[begin:end]) if end > begin else []
                token_ids += encode_plain(plain.replace(MARK, ""), end == 0)
                begin = next_begin
            if found:
                end = found.end()
        return token_ids + (encode(text[begin:]) if begin < len(text) else [])


def _marked(found: re.Match[str]) -> str:
    return found.group()[0] + MARK + found.group()[1:]
