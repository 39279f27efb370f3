"""Converts text to token ids and back, and applies chat templates. Wraps the checkpoint's Hugging Face tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.types.sampling_params import is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokenizer:
    """Wraps a transformers tokenizer.

    Attributes:
        vocab_size: number of token ids of the tokenizer; the model's vocabulary may be larger.
        special_ids: tokens that `skip_special_tokens` leaves out of the text.
        eos_token_id: the tokenizer's own end of sequence; None if it names none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._token_texts: dict[int, str] = {}
        # A token decoded alone may lose its leading space, so it is decoded after this other one.
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
        if not self._anchor:  # transformers returns such a tokenizer for a directory without tokenizer files
            raise ValueError("it is empty")
        self._anchor_text = self.decode(self._anchor, skip_special_tokens=False)

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer of a directory or hub id.

        Raises:
            ValueError: there is no tokenizer, or it cannot be read.
        """
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(path)))
        except Exception as error:  # the tokenizers library raises plain Exception for a broken file
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"tokenizer: {str(path)!r} has none that can be loaded ({reason}); "
                "name another with tokenizer, or use skip_tokenizer_init for token ids only"
            ) from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds to a prompt.

        A text that begins with the beginning of sequence, such as a rendered chat, does not get a second one.

        Raises:
            ValueError: the text is not valid Unicode.
        """
        if not is_unicode(text):
            raise ValueError("prompt: the text is not valid Unicode; it has half of a surrogate pair")
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        bos = self._tokenizer.bos_token_id
        if add_special_tokens and bos is not None and token_ids[:2] == [bos, bos]:
            return token_ids[text.startswith(self._tokenizer.bos_token) :]
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know add nothing."""
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def token_text(self, token_id: int) -> str:
        """Text that one token adds within a text; an incomplete character gives U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
            text = text.removeprefix(self._anchor_text)
            self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token adds within a text. A character's bytes may be divided among tokens."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None or token_id in self._tokenizer.added_tokens_decoder:
            return (token or "").encode()
        if self._byte_of is not None and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):  # SentencePiece's fallback
            return bytes.fromhex(byte[1])
        return self.token_text(token_id).encode()

    @cached_property
    def _byte_of(self) -> dict[str, int] | None:
        """The byte that each character of a token stands for, if the tokenizer works on bytes (GPT-2's BPE)."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            return None
        decoder = json.loads(backend.decoder.__getstate__())
        if "ByteLevel" not in [step["type"] for step in decoder.get("decoders", [decoder])]:
            return None
        shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [byte for byte in range(256) if byte not in shown]
        return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}

    @cached_property
    def max_token_bytes(self) -> int:
        """No token has more bytes of text than this."""
        return max(len(token.encode()) for token in self._tokenizer.get_vocab())

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's entry for each token, as the tokenizer's files have it; "" for ids that it does not know."""
        return [piece or "" for piece in self._tokenizer.convert_ids_to_tokens(list(token_ids))]

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn.

        Args:
            messages: each with a "role" and a "content" of text.

        Raises:
            ValueError: no chat template, messages of another form, or messages that the template refuses.
        """
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise ValueError("messages: the model's tokenizer has no chat template; give a prompt")
        check_messages(messages)
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from error
        assert isinstance(text, str)
        return self.encode(text, add_special_tokens=False)


def check_messages(messages: object) -> None:
    """Raise ValueError unless `messages` is a conversation: a list of messages with a role and a text."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages: {messages!r} is not allowed; it must be a list with at least one message")
    for index, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(name), str):
                raise ValueError(
                    f'messages[{index}]: {message!r} is not allowed; it must have "role" and "content" texts'
                )
