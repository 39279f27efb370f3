"""The tokens of a model as llguidance holds them: a trie of bytes. And the limits of every grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_runtime.types.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer


class _Tokens:
    """What llguidance asks of a tokenizer. Texts are divided byte by byte, which only its forced tokens would need."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id: int | None = None
        self.tokens: Sequence[bytes] = vocabulary.tokens
        self.special_token_ids: Sequence[int] = vocabulary.special_ids
        self._of_byte = {token: index for index, token in enumerate(vocabulary.tokens) if len(token) == 1}

    def __call__(self, text: Any) -> list[int]:
        data = text.encode() if isinstance(text, str) else bytes(text)
        return [self._of_byte[data[i : i + 1]] for i in range(len(data)) if data[i : i + 1] in self._of_byte]


def token_trie(vocabulary: Vocabulary) -> LLTokenizer:
    """A model's tokens for `LLMatcher`. It takes some 0.1 s for 100,000 tokens."""
    from llguidance import LLTokenizer

    wrapper: Any = _Tokens(vocabulary)
    return LLTokenizer(wrapper, eos_token=vocabulary.eos_ids)


def parser_limits() -> LLParserLimits:
    """Limits of time and memory that hostile grammars meet: some 20 ms to begin or for a step, 40 MB for a sequence."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
