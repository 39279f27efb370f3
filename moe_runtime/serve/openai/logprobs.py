"""OpenAI's two formats of log-probabilities."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_runtime.serve.values import finite

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer
    from moe_runtime.types.outputs import Logprob, PositionLogprobs


class TokenTexts:
    """Tokens as text and bytes.

    Args:
        tokenizer: None if there is no text; tokens then are called by their ids.
        hides_special: special tokens add nothing to the text.
    """

    def __init__(self, tokenizer: Tokenizer | None, hides_special: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if tokenizer is not None and hides_special else frozenset()

    def text(self, token_id: int) -> str:
        """The token's text; an incomplete character is U+FFFD."""
        return f"token_id:{token_id}" if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def data(self, token_id: int, shown: bool = False) -> bytes:
        """The bytes that the token adds to the text. A hidden one adds some only where it is `shown`."""
        if token_id in self._hidden and not shown:
            return b""
        return self.text(token_id).encode() if self._tokenizer is None else self._tokenizer.token_bytes(token_id)

    def chat(
        self, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs], num_best: int
    ) -> dict[str, list[dict[str, Any]] | None]:
        """The format of chats: each position lists the `num_best` best tokens."""
        return {
            "content": [
                {
                    **self._entry(token_id, position[token_id]),
                    "top_logprobs": [
                        self._entry(other, entry) for other, entry in position.items() if entry.rank <= num_best
                    ],
                }
                for token_id, position in zip(token_ids, logprobs, strict=True)
            ],
            "refusal": None,
        }

    def _entry(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        return {
            "token": self.text(token_id),
            "logprob": finite(entry.logprob),
            "bytes": list(self.data(token_id)),
        }


class TextLogprobs:
    """The format of completions, for one choice whose tokens come in parts.

    Keys are texts: of tokens with the same text, the best counts.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters before those that the decoder holds

    def part(
        self, token_ids: Sequence[int], logprobs: Sequence[PositionLogprobs | None], shown: str = ""
    ) -> dict[str, list[Any]]:
        """The next tokens. The first token of a prompt has no log-probabilities.

        Args:
            shown: the text of these tokens, if it may show special tokens because a client wrote it.
        """
        start = self._offset
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, position in zip(token_ids, logprobs, strict=True):
            found["tokens"].append(self._texts.text(token_id))
            found["token_logprobs"].append(None if position is None else finite(position[token_id].logprob))
            found["top_logprobs"].append(None if position is None else self._by_text(position))
            data = self._texts.data(token_id)
            if shown and not data:  # a special token: the client may have written it, or the tokenizer added it
                own = self._texts.data(token_id, shown=True)
                data = own if shown.startswith(own.decode(), self._offset - start) else data
            found["text_offset"].append(self._advance(data))
        return found

    def _advance(self, data: bytes) -> int:
        """Add a token's bytes. Returns the number of the character that its first byte belongs to."""
        begin = self._offset
        if data:
            held = self._decoder.getstate()[0]
            text = self._decoder.decode(data[:1])
            self._offset += len(text)
            if held and text:  # the first byte completes what was held, or what was held is no character
                begin = self._offset - (not self._decoder.getstate()[0])
            self._offset += len(self._decoder.decode(data[1:]))
        return begin

    def _by_text(self, position: PositionLogprobs) -> Mapping[str, float]:
        best: dict[str, float] = {}
        for token_id, entry in position.items():
            text = self._texts.text(token_id)
            best[text] = max(finite(entry.logprob), best.get(text, finite(entry.logprob)))
        return best
