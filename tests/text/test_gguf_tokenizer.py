"""Tokenizers of GGUF files encode and decode as the tokenizers that they were written from."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gguf
import pytest
from fakes import CHAT_TEMPLATE, SPECIAL, TEXTS, save_byte_tokenizer, save_metaspace_tokenizer
from gguf_models import read_bpe, write

from moe_runtime.text.gguf_tokenizer import CUTS
from moe_runtime.text.tokenizer import Tokenizer

SAMPLES = [
    *TEXTS,
    "",
    "<|user|>The sea<|end|> is <|end|>",
    " we'LL see 12345 tides\n\n  in 2024!  e\u0301tude\t<b>",
    "don't   STOP Ωmega's iPhone//\r\nnew",
]


def write_tokenizer(path: Path, kind: str, tokens: list[str], types: list[int], **values: Any) -> Path:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in values.items():
        name = f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}"
        kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        kinds[type(value)](name, value)
    write(writer)
    return path


def byte_parts(folder: Path) -> tuple[Tokenizer, list[str], list[int], list[str]]:
    """A tokenizer, its tokens, their types, its merges."""
    ours = save_byte_tokenizer(folder)
    return ours, *read_bpe(folder, SPECIAL)


def test_byte_level(tmp_path: Path) -> None:
    theirs, tokens, types, merges = byte_parts(tmp_path)
    file = write_tokenizer(
        tmp_path / "t.gguf",
        "gpt2",
        tokens,
        types,
        pre="gpt-2",
        merges=merges,
        eos_token_id=0,
        chat_template=CHAT_TEMPLATE,
    )
    ours = Tokenizer.from_path(file)
    assert (ours.vocab_size, ours.special_ids, ours.eos_token_id) == (theirs.vocab_size, theirs.special_ids, 0)
    for text in SAMPLES:
        token_ids = ours.encode(text)
        assert token_ids == theirs.encode(text)
        assert ours.decode(token_ids, False) == text
    messages = [{"role": "user", "content": "The sea"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)


@pytest.mark.parametrize("flag", [True, False, None])
def test_beginning_and_end(tmp_path: Path, flag: bool | None) -> None:
    _, tokens, types, merges = byte_parts(tmp_path)
    flags = {} if flag is None else {"add_bos_token": flag, "add_eos_token": flag}
    for pre, default in (("gpt-2", False), ("llama-bpe", True)):
        ids = {"bos_token_id": 1, "eos_token_id": 0}
        file = write_tokenizer(tmp_path / "t.gguf", "gpt2", tokens, types, pre=pre, merges=merges, **ids, **flags)
        token_ids = Tokenizer.from_path(file).encode("The sea")
        assert (token_ids[0] == 1) == (default if flag is None else flag)
        assert (token_ids[-1] == 0) == bool(flag)


def test_user_defined_tokens_are_found_and_not_special(tmp_path: Path) -> None:
    _, tokens, types, merges = byte_parts(tmp_path)
    file = write_tokenizer(
        tmp_path / "t.gguf", "gpt2", [*tokens, "<think>", "   "], [*types, 4, 4], pre="qwen2", merges=merges
    )
    tokenizer = Tokenizer.from_path(file)
    token_ids = tokenizer.encode("The<think>sea   is")
    assert len(tokens) in token_ids and len(tokens) + 1 in token_ids
    assert tokenizer.decode(token_ids) == "The<think>sea   is"
    assert tokenizer.added_tokens["<think>"] == len(tokens)


# Words by each `pre`, as the models' own tokenizers cut them.
WORDS = {
    "gpt-2": ["it", "'s", " 1234", " FooBar", "?!", "\n\n", " x"],
    "starcoder": ["it", "'s", " ", "1", "2", "3", "4", " FooBar", "?!", "\n\n", " x"],
    "qwen2": ["it", "'s", " ", "1", "2", "3", "4", " FooBar", "?!\n\n", " x"],
    "llama-bpe": ["it", "'s", " ", "123", "4", " FooBar", "?!\n\n", " x"],
    "glm4": ["it", "'s", " ", "123", "4", " FooBar", "?!\n\n", " x"],
    "gpt-4o": ["it's", " ", "123", "4", " Foo", "Bar", "?!\n\n", " x"],
    "tekken": ["it", "'s", " ", "1", "2", "3", "4", " Foo", "Bar", "?!\n\n", " x"],
    "kimi-k2": ["it's", " ", "123", "4", " Foo", "Bar", "?!\n\n", " x"],
    "deepseek-v3": ["it", "'s", " ", "123", "4", " FooBar", "?!\n\n", " x"],
}


@pytest.mark.parametrize("pre", WORDS)
def test_words(tmp_path: Path, pre: str) -> None:
    _, tokens, types, merges = byte_parts(tmp_path)
    file = write_tokenizer(tmp_path / "t.gguf", "gpt2", tokens, types, pre=pre, merges=merges)
    backend = Tokenizer.from_path(file)._tokenizer.backend_tokenizer
    text = "it's 1234 FooBar?!\n\n x"
    cut = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == WORDS[pre]
    assert set(WORDS) <= set(CUTS)


def test_sentencepiece(tmp_path: Path) -> None:
    """Scores in the order of the vocabulary, as SentencePiece has them."""
    save_metaspace_tokenizer(tmp_path)
    tokens, _, _ = read_bpe(tmp_path, SPECIAL)
    types = [3 if t in SPECIAL else 2 if t == "<unk>" else 6 if t.startswith("<0x") else 1 for t in tokens]
    scores = [-float(index) for index in range(len(tokens))]
    ids = {"unknown_token_id": tokens.index("<unk>"), "eos_token_id": 0, "bos_token_id": 1}
    file = write_tokenizer(tmp_path / "t.gguf", "llama", tokens, types, scores=scores, **ids)
    ours = Tokenizer.from_path(file)
    for text in ("The sea is calm", "naïve 你好 🙂", "stop and stopping", " a  b"):
        token_ids = ours.encode(text)
        assert token_ids[0] == 1
        assert token_ids[1:] == join_best(tokens, scores, text)
        assert ours.decode(token_ids) == text
    plain = write_tokenizer(tmp_path / "p.gguf", "llama", tokens, types, scores=scores, add_space_prefix=False, **ids)
    assert Tokenizer.from_path(plain).encode("The sea")[1:] == join_best(tokens, scores, "The sea", "")


def join_best(tokens: list[str], scores: list[float], text: str, first: str = "▁") -> list[int]:
    """SentencePiece's BPE by its definition: join the neighbours whose token has the best score, leftmost first."""
    ids = {token: index for index, token in enumerate(tokens)}
    pieces = list(first + text.replace(" ", "▁"))
    while True:
        joined = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids]
        if not joined:
            break
        place = -max(joined)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    found: list[int] = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


BAD = {
    "no tokens": ({"tokens": []}, "the file has no tokenizer.ggml.tokens"),
    "twice": ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens has a token twice"),
    "kind": ({"kind": "rwkv"}, "tokenizer.ggml.model: 'rwkv' is not known; it must be gpt2 or llama"),
    "pre": ({"pre": "bloom"}, "tokenizer.ggml.pre: 'bloom' is not known; known: gpt-2"),
    "merges": ({"merges": None}, "the file has no tokenizer.ggml.merges"),
    "merge": ({"merges": ["b a"]}, "tokenizer.ggml.merges: 'b a' is not allowed; it must be two tokens"),
    "scores": ({"kind": "llama", "scores": [1.0]}, "the file has no tokenizer.ggml.scores for its 3 tokens"),
    "eos": ({"eos_token_id": 3}, "tokenizer.ggml.eos_token_id: 3 is not allowed; it must be below 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    changes, message = BAD[name]
    good = {"kind": "gpt2", "tokens": ["a", "b", "ab"], "types": [1] * 3, "pre": "qwen2", "merges": ["a b"]}
    values: dict[str, Any] = {key: value for key, value in (good | changes).items() if value is not None}
    file = write_tokenizer(tmp_path / "t.gguf", **values)
    with pytest.raises(ValueError, match=r"^tokenizer: .*t\.gguf.* has none that can be loaded") as caught:
        Tokenizer.from_path(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)
