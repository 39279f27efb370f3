from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import save_byte_tokenizer, save_metaspace_tokenizer, save_unigram_tokenizer

from moe_runtime.text.tokenizer import RenderedPrompt, Tokenizer

SAVE = {"byte": save_byte_tokenizer, "metaspace": save_metaspace_tokenizer}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVE.items()}


@pytest.mark.parametrize("name", SAVE)
@pytest.mark.parametrize("text", ["The sea is calm", "naïve 你好 🙂", "<|end|>x", ""])
def test_there_and_back(tokenizers, name, text):
    tokenizer = tokenizers[name]
    token_ids = tokenizer.encode(text)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in token_ids)
    assert tokenizer.decode(token_ids) == text.replace("<|end|>", "")
    assert tokenizer.decode(token_ids, skip_special_tokens=False).replace("> ", ">") == text


@pytest.mark.parametrize("name", SAVE)
def test_ids_that_it_does_not_know_add_nothing(tokenizers, name):
    tokenizer = tokenizers[name]
    token_ids = tokenizer.encode("The sea")
    assert tokenizer.decode([*token_ids, tokenizer.vocab_size, 10**6]) == "The sea"
    assert tokenizer.token_text(10**6) == ""


@pytest.mark.parametrize("name", SAVE)
def test_the_texts_of_tokens_add_up(tokenizers, name):
    tokenizer = tokenizers[name]
    first, *others = tokenizer.encode("The sea is calm")
    assert first != others[0] and len(others) > 1
    assert "".join(map(tokenizer.token_text, others)) == "The sea is calm".removeprefix(tokenizer.decode([first]))
    assert tokenizer.token_text(tokenizer.encode("🦀")[-1]) == "\ufffd"
    assert tokenizer.token_text(tokenizer.encode("<|end|>")[-1]) == "<|end|>"


def test_the_bytes_of_added_tokens_are_those_of_their_text(tmp_path):
    """Gemma's runs of spaces are added tokens; the vocabulary writes them with another character."""
    tokenizer = save_unigram_tokenizer(tmp_path)
    token_ids = tokenizer.encode("a    b  c 🦀<|end|>")
    assert tokenizer.encode("a  b")[1] in tokenizer.added_tokens.values()
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == "a    b  c 🦀<|end|>".encode()
    assert tokenizer.decode(token_ids) == "a    b  c 🦀"


def test_special_ids(tokenizers):
    for tokenizer in tokenizers.values():
        special = [tokenizer.encode(text)[-1] for text in ("<|end|>", "<|user|>", "<|assistant|>")]
        assert tokenizer.special_ids == set(special)


def test_half_a_surrogate_pair_is_refused(tokenizers):
    with pytest.raises(ValueError, match=r"^prompt: the text is not valid Unicode"):
        tokenizers["byte"].encode("\ud83d")


def test_chat_template(tokenizers):
    tokenizer = tokenizers["byte"]
    messages = [{"role": "user", "content": "The sea"}, {"role": "assistant", "content": "is calm"}]
    assert tokenizer.has_chat_template
    text = "<|user|>The sea<|end|><|assistant|>is calm<|end|>"
    open_text = text + "<|assistant|>"
    assert tokenizer.apply_chat_template(messages) == RenderedPrompt(open_text, tokenizer.encode(open_text))
    closed = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert closed == RenderedPrompt(text, tokenizer.encode(text))


BAD_MESSAGES = [
    ([], r"^messages: \[\] is not allowed; it must be a list with at least one message$"),
    ("hello", r"^messages: 'hello' is not allowed"),
    (["hello"], r"^messages\.0: 'hello' is not allowed; it must have \"role\" and \"content\" texts$"),
    ([{"role": "user"}], r"^messages\.0: .* is not allowed"),
    ([{"role": "user", "content": "a"}, {"role": 5, "content": "b"}], r"^messages\.1: .* is not allowed"),
    ([{"role": "robot", "content": "a"}], r"^messages: the chat template fails: no robots$"),
    ([{"role": "user", "content": "\ud83d"}], r"not valid Unicode"),
]


@pytest.mark.parametrize(("messages", "error"), BAD_MESSAGES)
def test_bad_messages_are_refused(tokenizers, messages, error):
    with pytest.raises(ValueError, match=error):
        tokenizers["byte"].apply_chat_template(messages)


def test_without_a_chat_template(tokenizers):
    assert not tokenizers["metaspace"].has_chat_template
    with pytest.raises(ValueError, match=r"^messages: the model's tokenizer has no chat template"):
        tokenizers["metaspace"].apply_chat_template([{"role": "user", "content": "a"}])


FOLDERS = {
    "empty": {},
    "model only": {"config.json": {"model_type": "qwen3_moe"}},
    "needs more": {"config.json": {"model_type": "mixtral"}},
    "no json": {"tokenizer.json": "{broken", "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}},
    "nonsense": {
        "tokenizer.json": {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": 3}},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path, name):
    for file, content in FOLDERS[name].items():
        Path(tmp_path, file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"^tokenizer: '[^\n]*' has none that can be loaded \([^\n]+\); [^\n]*$"):
        Tokenizer.from_path(tmp_path)


def test_mistrals_own_form_is_refused_by_name(tmp_path):
    Path(tmp_path, "config.json").write_text('{"model_type": "mixtral"}')
    Path(tmp_path, "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"\(tekken.json, Mistral's own form, is not read; the [^\n]*needed\)"):
        Tokenizer.from_path(tmp_path)


def test_packages_that_sentencepiece_needs_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    Path(tmp_path, "config.json").write_text('{"model_type": "mixtral"}')
    Path(tmp_path, "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\(tokenizer.model needs the packages sentencepiece and protobuf; [^\n]*$"):
        Tokenizer.from_path(tmp_path)


def test_code_of_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    """transformers would ask on the terminal whether to run it. Kimi K2's checkpoints have such a tokenizer."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 1)
    ran = tmp_path / "ran"
    Path(tmp_path, "code.py").write_text(f"open({str(ran)!r}, 'w')")
    Path(tmp_path, "config.json").write_text('{"model_type": "kimi_k2", "auto_map": {"AutoConfig": "code.Config"}}')
    config = {"tokenizer_class": "TikTokenTokenizer", "auto_map": {"AutoTokenizer": ["code.TikTokenTokenizer", None]}}
    Path(tmp_path, "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^tokenizer: [^\n]* contains custom code [^\n]*$"):
        Tokenizer.from_path(tmp_path)
    assert not ran.exists()
