"""Random outputs of a grammar: walks of a matcher over the tokens that it allows."""

from __future__ import annotations

import random
from collections.abc import Sequence

from moe_runtime.grammars.compile import GrammarCompiler
from moe_runtime.grammars.matcher import Matcher
from moe_runtime.grammars.tokens import token_trie
from moe_runtime.types.structured_outputs import StructuredOutputs
from moe_runtime.types.vocabulary import Vocabulary

EOS = 256
LETTERS = frozenset(b"abcdefgh 0123456789-:_AB")
CLOSING = frozenset(b']}"')


def byte_vocabulary(special: Sequence[str] = ()) -> Vocabulary:
    """A token for each byte, one that ends outputs, and special tokens from 257 on."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"<eos>"] + [text.encode() for text in special]
    return Vocabulary(tokens, list(range(256, 257 + len(special))), [EOS])


class Walker:
    """Makes random outputs.

    Args:
        special: texts of special tokens.
        closers: texts that end free text; without help a random walk would hardly find them.
    """

    def __init__(self, special: Sequence[str] = (), closers: Sequence[str] = ()) -> None:
        self.vocabulary = byte_vocabulary(special)
        self.added = {text: 257 + index for index, text in enumerate(special)}
        self.compiler = GrammarCompiler(lambda: self.vocabulary)
        self._trie = token_trie(self.vocabulary)
        self._closers = [text.encode() for text in closers]

    def output(self, asked: StructuredOutputs, rng: random.Random, most: int = 4000) -> str | None:
        """The text of a random output; None if it has not ended after `most` tokens."""
        matcher = Matcher(self._trie, self.compiler.compile(asked))
        text, wanted = b"", b""
        for _ in range(most):
            allowed = matcher.allowed()
            assert allowed is not None and not matcher.error, matcher.error
            tokens = allowed.nonzero()[0].tolist()
            assert tokens, f"no token is allowed after {text!r}"
            token = self._choose(tokens, wanted, len(text), rng)
            wanted = wanted[1:] if wanted[:1] == bytes([token % 256]) and token < 256 else b""
            if not wanted and len(tokens) > 90 and rng.random() < 0.3 and self._closers:
                wanted = rng.choice(self._closers)
            if token == EOS:
                return text.decode()
            text += self.vocabulary.tokens[token]
            matcher.accept(token)
        return None

    def _choose(self, tokens: list[int], wanted: bytes, length: int, rng: random.Random) -> int:
        if wanted and wanted[0] in tokens:
            return wanted[0]
        special = [token for token in tokens if token >= EOS]
        if special and (rng.random() < 0.3 or len(special) == len(tokens)):
            return rng.choice(special)
        if length > 600 and (closing := [token for token in tokens if token in CLOSING]):
            return closing[0]
        plain = [token for token in tokens if token in LETTERS] if len(tokens) > 90 else []
        ascii_only = [token for token in tokens if token < 128]
        return rng.choice(plain or ascii_only or tokens)
