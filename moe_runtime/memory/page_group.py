"""Pages that a sequence holds: which ones, and at most how many. No torch.

A layer without a window reads all tokens of a sequence, so its pages are held to the end. A layer with a window of `w`
tokens reads the last `w - 1` tokens before each row; pages before these are given back.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig


@dataclass(frozen=True)
class PageGroup:
    """Layers with the same window, whose pages have the same numbers; see `ModelConfig.windows`.

    Attributes:
        window: None for none.
        block_size: tokens per page.
        max_chunk: maximum tokens of a sequence in a step.
    """

    window: int | None
    block_size: int
    max_chunk: int

    def count(self, num_tokens: int) -> int:
        """Pages of this many tokens, from a page's start."""
        return -(-num_tokens // self.block_size)

    def first_read(self, position: int) -> int:
        """Index of the first page that the row at `position` reads; later rows read no earlier one."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.block_size

    def most_decoding(self, num_tokens: int) -> int:
        """Maximum pages that a decoding sequence holds, until it has `num_tokens`."""
        return self._most(num_tokens, 1)

    def most(self, num_tokens: int) -> int:
        """Maximum pages that a sequence holds, until it has `num_tokens`: those of a chunk and of the window before."""
        return self._most(num_tokens, self.max_chunk)

    def most_of_step(self, num_sequences: int, num_tokens: int) -> int:
        """Maximum pages that sequences of `num_tokens` hold, if a step has at most `max_chunk` tokens of prompts."""
        whole = num_sequences * self.count(num_tokens)
        if self.window is None:
            return whole
        return min(whole, num_sequences * self.most_decoding(num_tokens) + self.count(self.max_chunk))

    def _most(self, num_tokens: int, chunk: int) -> int:
        whole = self.count(num_tokens)
        if self.window is None:
            return whole
        # A chunk's rows read `window - 1 + chunk` tokens in a row, which may begin at the end of a page.
        return min(whole, self.count(self.window + chunk - 2) + 1)


def page_groups(engine: EngineConfig, model: ModelConfig) -> tuple[PageGroup, ...]:
    """The groups in the order of `ModelConfig.windows`."""
    return tuple(PageGroup(window, engine.block_size, engine.max_num_batched_tokens) for window in model.windows)
