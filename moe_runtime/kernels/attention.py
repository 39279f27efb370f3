"""Metadata of one step's attention, and the key reads that follow from it.

Shape suffixes: S sequences that are read together, Q their query rows, M pages, C gathered keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyRead:
    """Query rows that attend together, the pages they gather and the keys that they may see.

    Attributes:
        rows: their rows in `q_THd`, `S * Q` of them, sequence after sequence.
        pages: int64 `[S, M]`, the pages to gather.
        num_keys: how many of the `M * block_size` gathered keys to use, from the front (C).
        visible: bool `[S, Q, C]`, which keys each query sees; `None` is the causal square (`Q == C`, one sequence).
    """

    rows: slice
    pages: Tensor
    num_keys: int
    visible: Tensor | None


@dataclass(frozen=True)
class DeviceLengths:
    """The same lengths as int32 tensors on the device, and each row's own sequence and position.

    Attributes:
        query_start, context_len: as in `AttentionMetadata`.
        sequence_T, position_T: of each row of `q_THd`.
    """

    query_start: Tensor
    context_len: Tensor
    sequence_T: Tensor
    position_T: Tensor


@dataclass(frozen=True)
class DecodeRows:
    """Rows that attend one by one. The host knows only their number and an upper limit of their contexts.

    Attributes:
        page_table: int64 `[S, max_pages]`, pages of each sequence.
        sequence_T, position_T: int64, of each row; a row sees the keys up to its own position.
        max_context: at least the largest position plus one.
    """

    page_table: Tensor
    sequence_T: Tensor
    position_T: Tensor
    max_context: int


@dataclass(frozen=True)
class AttentionMetadata:
    """A step's sequences on one rank, decodes first; rows of `q_THd` are in the same order.

    Attributes:
        num_decode: this many sequences at the front have exactly one query row and are attended as one batch.
        query_start: row where each sequence begins, and at the end the number of rows; `num_seqs + 1` ints.
        context_len: keys of each sequence, this step's own included; its last query is at position `context_len - 1`.
        page_table: int64 `[num_seqs, max_pages]` on the device: the pages of each sequence, padded with 0.
    """

    num_decode: int
    query_start: list[int]
    context_len: list[int]
    page_table: Tensor
    # A step's key reads are the same in every layer with the same window, so they are computed once.
    _reads: dict[tuple[int, int | None], list[KeyRead]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        num_seqs = len(self.context_len)
        assert len(self.query_start) == num_seqs + 1 and self.query_start[0] == 0, self.query_start
        assert self.page_table.shape[0] == num_seqs and self.page_table.dtype == torch.int64
        assert 0 <= self.num_decode <= num_seqs
        for index, (num_query, context) in enumerate(zip(self.num_query, self.context_len, strict=True)):
            assert 1 <= num_query <= context, (index, num_query, context)
            assert index >= self.num_decode or num_query == 1, (index, num_query)

    @classmethod
    def build(
        cls, num_query: Sequence[int], context_len: Sequence[int], pages: Sequence[Sequence[int]], device: torch.device
    ) -> AttentionMetadata:
        """Metadata of sequences with `num_query` new rows, `context_len` keys and these page numbers each.

        The leading sequences with one row become the decode batch, so callers put them first.
        """
        num_decode = next((i for i, count in enumerate(num_query) if count != 1), len(num_query))
        query_start = [0]
        for count in num_query:
            query_start.append(query_start[-1] + count)
        width = max(map(len, pages), default=0)
        padded = [[*pages, *[0] * (width - len(pages))] for pages in pages]
        table = torch.tensor(padded, dtype=torch.int64).view(len(pages), width).to(device)
        return cls(num_decode, query_start, list(context_len), table)

    @property
    def num_query(self) -> list[int]:
        """Query rows of each sequence."""
        return [end - start for start, end in zip(self.query_start, self.query_start[1:], strict=False)]

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return self.query_start[-1]

    @property
    def max_context(self) -> int:
        """Most keys of any sequence; 0 without sequences."""
        return max(self.context_len, default=0)

    @cached_property
    def on_device(self) -> DeviceLengths:
        """The lengths for kernels that read them on the device; one copy, made once per step."""
        num_query = torch.tensor(self.num_query, dtype=torch.int32)
        sequence_T = torch.repeat_interleave(torch.arange(len(num_query), dtype=torch.int32), num_query)
        query_start, context_len = (torch.tensor(x, dtype=torch.int32) for x in (self.query_start, self.context_len))
        position_T = torch.arange(self.num_tokens, dtype=torch.int32) + (context_len - query_start[1:])[sequence_T]
        parts = (query_start, context_len, sequence_T, position_T)
        return DeviceLengths(*torch.cat(parts).to(self.page_table.device).split([len(part) for part in parts]))

    def reads(self, block_size: int, sliding_window: int | None) -> list[KeyRead]:
        """The step as key reads: one for all decodes, one per prefill chunk.

        A window of `w` lets the query at position `p` see the keys `p - w + 1 .. p`; pages before it are not read.
        """
        key = (block_size, sliding_window)
        if key not in self._reads:
            chunks = range(self.num_decode, len(self.context_len))
            decode = [self._decode_read(block_size, sliding_window)] if self.num_decode else []
            self._reads[key] = decode + [self._chunk_read(i, block_size, sliding_window) for i in chunks]
        return self._reads[key]

    def _decode_read(self, block_size: int, window: int | None) -> KeyRead:
        contexts = self.context_len[: self.num_decode]
        first = [max(0, context - window) // block_size if window else 0 for context in contexts]
        num_pages = max((c - 1) // block_size + 1 - f for c, f in zip(contexts, first, strict=True))

        device = self.page_table.device
        context_S1 = torch.tensor(contexts, device=device)[:, None]
        first_S1 = torch.tensor(first, device=device)[:, None]
        page_SM = first_S1 + torch.arange(num_pages, device=device)
        # Sequences shorter than the longest read past their pages; those keys are masked.
        block_SM = self.page_table[: self.num_decode].gather(1, page_SM.clamp(max=self.page_table.shape[1] - 1))
        position_SC = first_S1 * block_size + torch.arange(num_pages * block_size, device=device)
        visible_SC = position_SC < context_S1
        if window is not None:
            visible_SC &= position_SC >= context_S1 - window
        return KeyRead(slice(0, self.num_decode), block_SM, num_pages * block_size, visible_SC[:, None])

    def _chunk_read(self, index: int, block_size: int, window: int | None) -> KeyRead:
        rows = slice(self.query_start[index], self.query_start[index + 1])
        context = self.context_len[index]
        first_query = context - (rows.stop - rows.start)
        first_page = max(0, first_query - window + 1) // block_size if window else 0
        block_SM = self.page_table[index : index + 1, first_page : (context - 1) // block_size + 1]
        first_key = first_page * block_size
        num_keys = context - first_key
        if first_query == 0 and (window is None or window >= context):
            return KeyRead(rows, block_SM, num_keys, None)

        key_C = torch.arange(first_key, context, device=self.page_table.device)
        query_Q1 = torch.arange(first_query, context, device=self.page_table.device)[:, None]
        visible_QC = key_C <= query_Q1
        if window is not None:
            visible_QC &= key_C > query_Q1 - window
        return KeyRead(rows, block_SM, num_keys, visible_QC[None])
