"""Where a sequence is in its grammar. It lives on its rank, and follows the tokens that are sampled there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_runtime.grammars.tokens import parser_limits

if TYPE_CHECKING:
    import numpy.typing as npt
    from llguidance import LLTokenizer


class Matcher:
    """The state of one sequence.

    Args:
        trie: the model's tokens.
        grammar: a text of `GrammarCompiler`.
        output: tokens that the sequence has generated already.
    """

    def __init__(self, trie: LLTokenizer, grammar: str, output: Sequence[int] = ()) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(trie, grammar, log_level=0, limits=parser_limits())
        self._allowed: npt.NDArray[np.bool_] | None = None
        self._has_ended = False
        for token in output:
            self.accept(token)

    @property
    def error(self) -> str:
        """Why the sequence cannot go on; empty if it can."""
        return "" if self._has_ended else str(self._matcher.get_error())

    def look_ahead(self) -> None:
        """Find the tokens that may come next, if they are not known yet. It may take a millisecond."""
        if self._allowed is None and not self._has_ended:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """bool [tokens of the vocabulary, or a few more]: those that may come next. None after the end."""
        self.look_ahead()
        return self._allowed

    def accept(self, token: int) -> None:
        """Take the next token. After the token that ends the output, others mean nothing."""
        self._allowed = None
        if not self._has_ended:
            self._has_ended = self._matcher.is_stopped() or not self._matcher.consume_token(token)
            self._has_ended = self._has_ended and not self._matcher.is_error()
