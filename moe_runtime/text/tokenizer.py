"""Converts text to token ids and back, and applies chat templates. Wraps the checkpoint's Hugging Face tokenizer."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.text.chat_history import template_messages
from moe_runtime.text.chat_template import ChatTemplate
from moe_runtime.text.detokenizer import REPLACEMENT
from moe_runtime.text.escape import MARK, ControlTexts, has_mark, shows_mark
from moe_runtime.text.formats.registry import ANSWER_TAGS
from moe_runtime.text.gguf_tokenizer import build_tokenizer
from moe_runtime.types.sampling_params import is_unicode
from moe_runtime.types.vocabulary import Vocabulary
from moe_runtime.weights.gguf_file import GGUF_SUFFIX, Gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_UNICODE = "prompt: the text is not valid Unicode; it has half of a surrogate pair"
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # a byte in the vocabulary of SentencePiece, for what it has no piece for


@dataclass(frozen=True)
class RenderedPrompt:
    """A conversation in the model's template."""

    text: str
    token_ids: list[int]


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
        """Load the tokenizer of a directory, hub id or GGUF file. Code that a checkpoint brings along is not run.

        Raises:
            ValueError: there is no tokenizer, or it cannot be read.
        """
        from transformers import AutoTokenizer

        try:
            if Path(path).suffix == GGUF_SUFFIX:
                return cls(build_tokenizer(Gguf(Path(path)).metadata))
            _check_files(Path(path))
            # With mistral-common installed, transformers would read tekken.json in place of tokenizer.json.
            return cls(AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, mistral_format=False))
        except Exception as error:  # the tokenizers library raises plain Exception for a broken file
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"tokenizer: {str(path)!r} has none that can be loaded ({reason}); "
                "name another with tokenizer, or use skip_tokenizer_init for token ids only"
            ) from error

    def warm_up(self) -> None:
        """Do what the first request would wait for: read the vocabulary, compile the chat template."""
        assert self.max_token_bytes
        if self.has_chat_template:
            with contextlib.suppress(ValueError):  # this template wants other messages
                self.apply_chat_template([{"role": "user", "content": "a"}])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds to a prompt.

        A text that begins with the beginning of sequence, such as a rendered chat, does not get a second one.

        Raises:
            ValueError: the text is not valid Unicode.
        """
        if not is_unicode(text):
            raise ValueError(NO_UNICODE)
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self._without_second_bos(text, token_ids) if add_special_tokens else token_ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text; together they take less time. Raises ValueError as `encode`."""
        if not all(map(is_unicode, texts)):
            raise ValueError(NO_UNICODE)
        encoded: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return [
            self._without_second_bos(text, token_ids) if add_special_tokens else token_ids
            for text, token_ids in zip(texts, encoded, strict=True)
        ]

    def _without_second_bos(self, text: str, token_ids: list[int]) -> list[int]:
        """The tokens of a text with special tokens; a text that begins with that of the first one has it once."""
        bos = self._tokenizer.bos_token_id
        if bos is not None and token_ids[:2] == [bos, bos]:
            return token_ids[text.startswith(self._tokenizer.bos_token) :]
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know add nothing. Bytes that are no text give U+FFFD."""
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        if REPLACEMENT in text and "ByteFallback" in self._decoder_steps:
            hidden = self.special_ids if skip_special_tokens else frozenset()
            return self._decode_pieces(self.pieces([token_id for token_id in token_ids if token_id not in hidden]))
        return text

    def _decode_pieces(self, pieces: Sequence[str]) -> str:
        """Text of SentencePiece's pieces, of which some bytes are no text.

        The tokenizers library makes all bytes of a run U+FFFD if the run as a whole is no text: a byte would take back
        the characters before it. Here only the bytes that are no text are replaced, as tokenizers on bytes do it.
        """
        mended: list[str] = []
        for is_byte, run in groupby(filter(None, pieces), key=lambda piece: BYTE_PIECE.fullmatch(piece) is not None):
            if not is_byte:
                mended += run
                continue
            for character in bytes.fromhex("".join(piece[3:5] for piece in run)).decode(errors="replace"):
                whole = character != REPLACEMENT
                mended += [f"<0x{byte:02X}>" for byte in character.encode()] if whole else [REPLACEMENT]
        text = self._tokenizer.backend_tokenizer.decoder.decode(mended)
        assert isinstance(text, str)
        return text

    @cached_property
    def _decoder_steps(self) -> Sequence[str]:
        """Types of the steps of the tokenizers library's decoder."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            return ()
        decoder = json.loads(backend.decoder.__getstate__())
        return [step["type"] for step in decoder.get("decoders", [decoder])]

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
        if token is None or token_id in self._added_ids:
            return self.token_text(token_id).encode()
        if self._byte_of is not None and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        if byte := BYTE_PIECE.fullmatch(token):
            return bytes.fromhex(byte[1])
        return self.token_text(token_id).encode()

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.added_tokens.values())

    @cached_property
    def _byte_of(self) -> dict[str, int] | None:
        """The byte that each character of a token stands for, if the tokenizer works on bytes (GPT-2's BPE)."""
        if "ByteLevel" not in self._decoder_steps:
            return None
        shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [byte for byte in range(256) if byte not in shown]
        return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}

    def vocabulary(self, eos_ids: Collection[int]) -> Vocabulary:
        """The bytes of all tokens. It takes a second for 100,000 of them. `eos_ids` end an output."""
        return Vocabulary([self.token_bytes(i) for i in range(self.vocab_size)], sorted(self.special_ids), [*eos_ids])

    @cached_property
    def max_token_bytes(self) -> int:
        """No token has more bytes of text than this."""
        return max(len(token.encode()) for token in self._tokenizer.get_vocab())

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's entry for each token, as the tokenizer's files have it; "" for ids that it does not know."""
        return [piece or "" for piece in self._tokenizer.convert_ids_to_tokens(list(token_ids))]

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        source = self._tokenizer.chat_template
        return None if source is None else ChatTemplate(source, self._tokenizer.special_tokens_map)

    @cached_property
    def added_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens that stand beside the vocabulary: special tokens, and others such as tags of tool calls."""
        return {token.content: token_id for token_id, token in self._tokenizer.added_tokens_decoder.items()}

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedPrompt:
        """The text and tokens of a conversation. Arguments and errors are those of `render_chat`."""
        rendered = self.render_chat(messages, **options)
        if isinstance(rendered, RenderedPrompt):
            return rendered
        return RenderedPrompt(rendered, self._encode_rendered(rendered))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        escape_special_tokens: bool = False,
    ) -> str | RenderedPrompt:
        """The prompt of a conversation, ready for the assistant's turn.

        It is a text to encode without special tokens, or has its tokens if it holds escaped texts.

        Args:
            messages: of OpenAI's form; each has a "role" and a "content" of text.
            tools: OpenAI's tool objects.
            add_generation_prompt, continue_final_message, template_kwargs: as `ChatTemplate.render` takes them.
            escape_special_tokens: texts of control tokens in messages, tools and template_kwargs are encoded as plain
                text, except for tags of thoughts and calls in an assistant's content and reasoning.

        Raises:
            ValueError: no chat template, messages of another form, or messages with which the template fails.
        """
        if self.chat_template is None:
            raise ValueError("messages: the model's tokenizer has no chat template; give a prompt")
        history: Any = template_messages(messages, self.chat_template.source(bool(tools)))
        if escape_special_tokens:
            history = self._control_texts.mark_messages(history)
            tools, template_kwargs = self._control_texts.mark(tools), self._control_texts.mark(template_kwargs)
        text = self.chat_template.render(
            history,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        if escape_special_tokens and shows_mark(text) and has_mark([history, tools, template_kwargs]):
            raise ValueError(
                "messages: a control token's text cannot be escaped, because the chat template changes it; remove it"
            )
        if escape_special_tokens and MARK in text:
            token_ids = self._control_texts.encode(text, self._encode_rendered, self._encode_plain)
            return RenderedPrompt(text.replace(MARK, ""), token_ids)
        return text

    def _encode_rendered(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def _control_texts(self) -> ControlTexts:
        # Some tokenizers add runs of blanks as tokens; they control nothing.
        return ControlTexts([text for text in self.added_tokens if not text.isspace()], ANSWER_TAGS)

    def _encode_plain(self, text: str, begins_prompt: bool) -> list[int]:
        """Token ids of a text in which no control token is looked for.

        Raises:
            ValueError: the tokenizer makes a control token of plain text.
        """
        token_ids = self._model_ids(text)
        if not begins_prompt and self._marks_beginnings:
            # The tokenizer gives only a prompt's beginning a blank, so the text is encoded after a newline.
            newline = self._model_ids("\n")
            after_newline = self._model_ids("\n" + text)
            if after_newline[: len(newline)] == newline:
                token_ids = after_newline[len(newline) :]
        if not self.special_ids.isdisjoint(token_ids):
            raise ValueError(
                "messages: a control token's text cannot be escaped with this model's tokenizer; remove it"
            )
        return token_ids

    def _model_ids(self, text: str) -> list[int]:
        """Token ids by the tokenizer's model alone, without its added tokens."""
        backend = self._tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    @cached_property
    def _marks_beginnings(self) -> bool:
        """Whether a text at the beginning of a prompt has other tokens than after a control token."""
        control = min(self.added_tokens)
        return self._encode_rendered(control + "a")[1:] != self._model_ids("a")


def _check_files(folder: Path) -> None:
    """Raise ValueError if a folder's only tokenizer is in a form that cannot be loaded, and the reason is known."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    if (folder / "tokenizer.json").exists():
        return
    if (folder / "tekken.json").exists():
        raise ValueError("tekken.json, Mistral's own form, is not read; the model's tokenizer.json is needed")
    if (folder / "tokenizer.model").exists() and not (is_sentencepiece_available() and is_protobuf_available()):
        raise ValueError(
            "tokenizer.model needs the packages sentencepiece and protobuf; the model's tokenizer.json needs none"
        )
