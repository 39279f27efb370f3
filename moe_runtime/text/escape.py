"""Texts of control tokens that a client sends, as plain text.

Otherwise a user's "<|im_end|>" would end the user's turn. A mark within each such text tells it from the template's own
control tokens once the prompt is rendered. Any added token can control a model, whether or not its tokenizer calls it
special: DeepSeek's turns begin with added tokens that are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from moe_runtime.text.chat_history import REASONING_FIELDS

MARK = "\ufdd0"  # a code point that Unicode keeps free for a program's own use
ESCAPED_MARKS = ("\\ufdd0", "%ef%b7%90")  # as filters such as tojson(ensure_ascii=true) and urlencode write it

Encode = Callable[[str], list[int]]


class ControlTexts:
    """Marks texts of control tokens, and encodes a rendered prompt that holds marked ones.

    Args:
        tokens: texts of all control tokens.
        answer_tags: those that a model writes within an answer, around thoughts and calls.
    """

    def __init__(self, tokens: Collection[str], answer_tags: Collection[str] = ()) -> None:
        self._pattern = _any_of(tokens)
        self._not_in_answers = _any_of(set(tokens).difference(answer_tags))

    def mark(self, value: Any) -> Any:
        """A copy of a value in which control texts are marked, in keys too."""
        if isinstance(value, str):
            return _mark(self._pattern, value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    def mark_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with marks. Tags in an assistant's answer stay as they are: templates look for them there."""
        marked = []
        for message in messages:
            copy = self.mark(message)
            if message.get("role") == "assistant":
                for name in ("content", *REASONING_FIELDS):
                    if isinstance(text := message.get(name), str):
                        copy[name] = _mark(self._not_in_answers, text)
            marked.append(copy)
        return marked

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


def shows_mark(text: str) -> bool:
    """Whether a template has changed a mark into other characters, which would stay in the prompt."""
    return any(escaped in text.lower() for escaped in ESCAPED_MARKS)


def has_mark(value: Any) -> bool:
    """Whether a control text is marked in messages, tools or variables."""
    if isinstance(value, str):
        return MARK in value
    if isinstance(value, Mapping):
        return any(has_mark(part) for item in value.items() for part in item)
    return isinstance(value, (list, tuple)) and any(map(has_mark, value))


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    # The mark stands after a token's first character, so a token of one character must not be followed by it.
    patterns = [re.escape(token) + (f"(?!{MARK})" if len(token) == 1 else "") for token in longest_first]
    return re.compile("|".join(patterns) or "(?!)")


def _mark(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda found: found.group()[0] + MARK + found.group()[1:], text.replace(MARK, ""))
