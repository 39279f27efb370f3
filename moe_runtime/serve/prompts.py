"""Turns clients' prompts into token ids. Long texts take time, so this runs outside of the event loop, and is bounded.

A text that cannot fit the context is refused before it is tokenised. The work ends when its client goes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from moe_runtime.engine.request_rules import RequestRules
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer

T = TypeVar("T")
MAX_THREADS = 2  # that tokenise at the same time
PIECE_CHARS = 2**16  # tokenised between two looks at whether the client is still there
LONG = 8  # characters per token of context above which a text is counted in pieces first
BORDER_TOKENS = 8  # more tokens than this cannot come from cutting a text once


class ClientGoneError(Exception):
    """The work was given up, as its client has gone."""


class Tokenising:
    """Runs tokenising in threads, a few at a time."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(MAX_THREADS)

    async def run(self, work: Callable[[threading.Event], T]) -> T:
        """The result of `work`, which gets an event that is set when the caller is cancelled."""
        async with self._slots:
            gone = threading.Event()
            try:
                return await asyncio.to_thread(work, gone)
            finally:
                gone.set()


def require_tokenizer(tokenizer: Tokenizer | None, field: str) -> Tokenizer:
    """Raise ValueError if there is no tokenizer."""
    if tokenizer is None:
        raise ValueError(f"{field}: text is not allowed, as this server has no tokenizer; send token ids")
    return tokenizer


def encode(
    tokenizer: Tokenizer,
    text: str,
    rules: RequestRules,
    params: SamplingParams,
    gone: threading.Event,
    add_special_tokens: bool = True,
) -> list[int]:
    """Token ids of a text.

    Raises:
        ValueError: the text is too long, or no text.
        ClientGoneError: `gone` was set.
    """
    check_size(tokenizer, [text], rules, params, gone)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def check_size(
    tokenizer: Tokenizer, texts: Sequence[str], rules: RequestRules, params: SamplingParams, gone: threading.Event
) -> None:
    """Check that texts may fit the context. Texts that are much longer than most are tokenised in pieces for that.

    Raises:
        ValueError: they cannot fit.
        ClientGoneError: `gone` was set.
    """
    num_chars = sum(map(len, texts))
    rules.check_length(num_chars // tokenizer.max_token_bytes, params, at_least=True)
    if num_chars <= LONG * rules.max_model_len:
        return
    least = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARS):
            if gone.is_set():
                raise ClientGoneError
            piece = tokenizer.encode(text[start : start + PIECE_CHARS], add_special_tokens=False)
            least += max(0, len(piece) - BORDER_TOKENS)
            rules.check_length(least, params, at_least=True)
