"""Writes the GGUF file's byte-level BPE tokenizer as the files that `transformers.AutoTokenizer` reads."""

import json
from pathlib import Path
from typing import Any

from moe_runtime.demo.gguf_model import DenseModel

CONTROL_TOKEN_TYPE = 3


def write_tokenizer(dense: DenseModel, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template) into `folder`."""
    tokens: list[str] = dense.field("tokenizer.ggml.tokens")
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer_json(dense, tokens), ensure_ascii=False))
    config = {
        # In every version of transformers, this class takes tokenizer.json unchanged.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[dense.field("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[dense.field("tokenizer.ggml.eos_token_id")],
        "unk_token": tokens[dense.field("tokenizer.ggml.unknown_token_id")],
        "pad_token": tokens[dense.field("tokenizer.ggml.padding_token_id")],
        "model_max_length": dense.sizes.context_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": dense.field("tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _tokenizer_json(dense: DenseModel, tokens: list[str]) -> dict[str, Any]:
    token_types: list[int] = dense.field("tokenizer.ggml.token_type")
    merges: list[str] = dense.field("tokenizer.ggml.merges")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    # The GGUF's pre-tokenizer "smollm": every digit alone, then GPT-2's regular expression.
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **flags}
            for index, (token, kind) in enumerate(zip(tokens, token_types, strict=True))
            if kind == CONTROL_TOKEN_TYPE
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
