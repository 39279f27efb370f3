"""Prompts that were rendered and tokenised lately, bounded in number and bytes; the least recently used goes first."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections import OrderedDict

from moe_runtime.text.tokenizer import RenderedPrompt

MAX_PROMPTS = 1024
MAX_BYTES = 16 * 2**20
ENTRY_BYTES = 256  # of a key and the objects of an entry, about


def prompt_key(*parts: object) -> bytes:
    """The key of a prompt that is a function of `parts`, which are JSON values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


class PromptCache:
    """Maps keys to prompts.

    Args:
        max_prompts, max_bytes: what it holds at most, the latter about.
    """

    def __init__(self, max_prompts: int = MAX_PROMPTS, max_bytes: int = MAX_BYTES) -> None:
        self._max_prompts, self._max_bytes = max_prompts, max_bytes
        self._prompts: OrderedDict[bytes, tuple[str, array[int]]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def get(self, key: bytes) -> RenderedPrompt | None:
        """The prompt, with a list of ids that belongs to the caller; None if it is not here."""
        found = self._prompts.get(key)
        if found is None:
            return None
        self._prompts.move_to_end(key)
        text, token_ids = found
        return RenderedPrompt(text, token_ids.tolist())

    def put(self, key: bytes, prompt: RenderedPrompt) -> None:
        """Add a prompt, or use it. One that is larger than the cache is left out."""
        entry = (prompt.text, array("I", prompt.token_ids))
        if _bytes_of(entry) > self._max_bytes:
            return
        if (old := self._prompts.pop(key, None)) is not None:
            self.num_bytes -= _bytes_of(old)
        self._prompts[key] = entry
        self.num_bytes += _bytes_of(entry)
        while len(self._prompts) > self._max_prompts or self.num_bytes > self._max_bytes:
            _, oldest = self._prompts.popitem(last=False)
            self.num_bytes -= _bytes_of(oldest)


def _bytes_of(entry: tuple[str, array[int]]) -> int:
    text, token_ids = entry
    return ENTRY_BYTES + sys.getsizeof(text) + token_ids.itemsize * len(token_ids)
