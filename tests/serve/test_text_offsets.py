"""`text_offset` of completions: each token's offset is that of its first character in the text."""

from __future__ import annotations

import pytest
from fakes import save_byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.serve.openai.logprobs import TextLogprobs, TokenTexts
from moe_runtime.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def offsets(tokenizer: Tokenizer, token_ids: list[int], shown: str = "") -> list[int]:
    found = TextLogprobs(TokenTexts(tokenizer, True)).part(token_ids, [None] * len(token_ids), shown)
    return found["text_offset"]


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=20))
def test_of_any_text_byte_by_byte(tokenizer: Tokenizer, text: str) -> None:
    of_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    token_ids = [of_byte[bytes([byte])] for byte in text.encode()]
    assert offsets(tokenizer, token_ids) == [number for number, char in enumerate(text) for _ in char.encode()]


def test_of_a_rendered_prompt(tokenizer: Tokenizer) -> None:
    """A client's own text shows the special tokens in it; one that the tokenizer added is not in the text."""
    text = "<|user|>Hi<|end|><|assistant|>"
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert offsets(tokenizer, token_ids, text) == [0, 8, 9, 10, 17]
    assert offsets(tokenizer, token_ids) == [0, 0, 1, 2, 2]
    added = [token_ids[-1], *tokenizer.encode("Hi", add_special_tokens=False)]
    assert offsets(tokenizer, added, "Hi") == [0, 0, 1]


def test_after_an_incomplete_character(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🦀")[0]
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    assert offsets(tokenizer, [half, a, half, half, a]) == [0, 1, 2, 3, 4]
