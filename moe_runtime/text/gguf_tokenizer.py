"""Builds a tokenizer from the metadata of a GGUF file: from its vocabulary, merges or scores, and kinds of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

KEY = "tokenizer.ggml."
CONTROL, USER_DEFINED = 3, 4  # values of `token_type`
BLANK = "▁"  # stands for a blank in SentencePiece's vocabularies

# Parts of the regular expressions that cut a text into words, as the models' own tokenizers have them.
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
ONE_DIGIT = rf"{ENDINGS}|{WORD}|\p{{N}}|{MARKS}|{REST}"
THREE_DIGITS = rf"{ENDINGS}|{WORD}|\p{{N}}{{1,3}}|{MARKS}|{REST}"


def _cased(endings: str, digits: str, marks: str = r" ?[^\s\p{L}\p{N}]+[\r\n/]*", without: str = "") -> str:
    """Words that begin with upper case and go on with lower case; letters are not of a class `without`."""
    first = r"[^\r\n\p{L}\p{N}]?"
    words = [f"{first}[{UPPER}{without}]{a}[{LOWER}{without}]{b}{endings}" for a, b in (("*", "+"), ("+", "*"))]
    return rf"{'|'.join(words)}|\p{{N}}{digits}|{marks}|{REST}"


CASED = _cased(f"{ENDINGS}?", "{1,3}")
KIMI = r"[\p{Han}]+|" + _cased(f"{ENDINGS}?", "{1,3}", MARKS, r"&&[^\p{Han}]")
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + REST,
)


@dataclass(frozen=True)
class Cut:
    """How a text is cut into words, each of which is tokenised by itself.

    Attributes:
        patterns: regular expressions, applied in order; their matches are words.
        by_gpt2: after that, words are cut as in GPT-2.
        single_digits: before all, each digit is a word.
        composed: before all, the text is brought into Unicode's form NFC.
        whole_words: a word that is in the vocabulary is one token, whatever the merges.
        adds_bos: a prompt begins with the beginning of sequence, unless the file says otherwise.
    """

    patterns: tuple[str, ...] = ()
    by_gpt2: bool = False
    single_digits: bool = False
    composed: bool = False
    whole_words: bool = False
    adds_bos: bool = False


LLAMA3 = Cut((THREE_DIGITS,), whole_words=True, adds_bos=True)
STARCODER = Cut(by_gpt2=True, single_digits=True)
# By `tokenizer.ggml.pre`.
CUTS = {
    "gpt-2": Cut(by_gpt2=True),
    "olmo": Cut(by_gpt2=True, composed=True),
    "starcoder": STARCODER,
    "refact": STARCODER,
    "smollm": STARCODER,
    "qwen2": Cut((ONE_DIGIT,), composed=True),
    "hunyuan": Cut((ONE_DIGIT,)),
    "solar-open": Cut((ONE_DIGIT,)),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "glm4": Cut((THREE_DIGITS,)),
    "chatglm-bpe": Cut((THREE_DIGITS,)),
    "gpt-4o": Cut((CASED,)),
    "minimax-m2": Cut((CASED,)),
    "tekken": Cut((_cased("", ""),), whole_words=True, adds_bos=True),
    "kimi-k2": Cut((KIMI,)),
    "deepseek-v3": Cut(DEEPSEEK),
    "hunyuan-dense": Cut(DEEPSEEK),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file's metadata describes, with its chat template.

    Raises:
        ValueError: there is none, or it is of a kind that is not known.
    """
    from transformers import PreTrainedTokenizerFast

    kind, tokens = metadata.get(f"{KEY}model"), metadata.get(f"{KEY}tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"the file has no {KEY}tokens")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{KEY}tokens has a token twice")
    if kind == "gpt2":
        raw, adds_bos = _byte_level(metadata, tokens)
    elif kind == "llama":
        raw, adds_bos = _sentencepiece(metadata, tokens), True
    else:
        raise ValueError(f"{KEY}model: {kind!r} is not known; it must be gpt2 or llama")
    _add_tokens(raw, tokens, metadata.get(f"{KEY}token_type", []))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: token for name, key in names.items() if (token := _token(metadata, tokens, key)) is not None}
    _add_ends(raw, special, metadata.get(f"{KEY}add_bos_token", adds_bos), metadata.get(f"{KEY}add_eos_token", False))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        chat_template=_chat_template(metadata),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """BPE on bytes, and whether it adds the beginning of sequence if the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get(f"{KEY}pre")
    if not isinstance(name, str) or name not in CUTS:
        raise ValueError(f"{KEY}pre: {name!r} is not known; known: {', '.join(CUTS)}")
    cut, ids = CUTS[name], _ids(tokens)
    raw = Tokenizer(models.BPE(ids, _merges(metadata, ids), ignore_merges=cut.whole_words))
    if cut.composed:
        raw.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.single_digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.by_gpt2))
    raw.pre_tokenizer = pre_tokenizers.Sequence(steps)
    raw.decoder = decoders.ByteLevel()
    return raw, cut.adds_bos


def _merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens that are joined, in order. Raises ValueError if there are none, or one makes no token."""
    merges = metadata.get(f"{KEY}merges")
    if not isinstance(merges, list):
        raise ValueError(f"the file has no {KEY}merges")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= ids.keys():
            raise ValueError(f"{KEY}merges: {merge!r} is not allowed; it must be two tokens that make a third")
        pairs.append((left, right))
    return pairs


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of neighbours that make a token together, those with the best score are joined first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids, scores = _ids(tokens), metadata.get(f"{KEY}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError(f"the file has no {KEY}scores for its {len(tokens)} tokens")
    merges = [
        (token[:end], token[end:])
        for token, _ in sorted(zip(tokens, scores, strict=True), key=lambda item: -item[1])
        for end in range(1, len(token))
        if token[:end] in ids and token[end:] in ids
    ]
    unknown = _token(metadata, tokens, "unknown")
    raw = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    begins_with_blank = metadata.get(f"{KEY}add_space_prefix", True)
    blanks = normalizers.Replace(" ", BLANK)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), blanks]) if begins_with_blank else blanks
    strip = [decoders.Strip(" ", 1, 0)] if begins_with_blank else []
    raw.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return raw


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _add_tokens(raw: tokenizers.Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Control tokens, and others that are found in a text as they are."""
    from tokenizers import AddedToken

    raw.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )


def _add_ends(raw: tokenizers.Tokenizer, special: Mapping[str, str], adds_bos: bool, adds_eos: bool) -> None:
    """Let prompts begin with the beginning of sequence, and end with its end."""
    from tokenizers import processors

    first = [special["bos_token"]] if adds_bos and "bos_token" in special else []
    last = [special["eos_token"]] if adds_eos and "eos_token" in special else []
    if first or last:
        ids = [(token, raw.token_to_id(token)) for token in dict.fromkeys((*first, *last))]
        raw.post_processor = processors.TemplateProcessing([*first, "$A", *last], special_tokens=ids)


def _token(metadata: Mapping[str, Any], tokens: Sequence[str], key: str) -> str | None:
    """The token that `tokenizer.ggml.<key>_token_id` names; None if it names none. Raises ValueError if it is wrong."""
    token_id = metadata.get(f"{KEY}{key}_token_id")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ValueError(f"{KEY}{key}_token_id: {token_id!r} is not allowed; it must be below {len(tokens)}")
    return tokens[token_id]


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name."""
    first, names = metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.chat_templates", [])
    others = {name: metadata[key] for name in names if (key := f"tokenizer.chat_template.{name}") in metadata}
    return {"default": first, **others} if first and others else first
