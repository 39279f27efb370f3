"""A step on one rank: everything that is known before the previous step has ended, which is all but its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_runtime.grammars.matcher import Matcher
from moe_runtime.layers.batch import Batch, StepLimits, StepPolicies
from moe_runtime.layers.kit import HiddenRows
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.messages import Chunk, ExpertWork, RankPlan, RankStep


@dataclass
class Sequence:
    """A sequence on this rank: all its tokens so far, and the pages of each page group with its keys and values.

    Pages behind a window stay in the list, so that a position finds its page, but are not read. `matcher` is its place
    in its grammar; None if its output is free.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    pages: list[list[int]]
    matcher: Matcher | None = None


@dataclass
class StepRows:
    """A step's rows on one rank as plain numbers, in order.

    Of each page group, `cache_positions` are the rows' places in the cache, and `pages` the pages of each sequence.
    """

    positions: list[int]
    num_prompt: list[int]
    cache_positions: list[list[int]]
    pages: list[list[list[int]]]

    @classmethod
    def take(cls, chunks: list[Chunk], sequences: list[Sequence], num_groups: int, block_size: int) -> StepRows:
        """The rows of chunks; adds the chunks' new pages to their sequences."""
        rows = cls([], [], [[] for _ in range(num_groups)], [[] for _ in range(num_groups)])
        for chunk, sequence in zip(chunks, sequences, strict=True):
            where = range(chunk.start, chunk.start + chunk.num_tokens)
            rows.positions += where
            rows.num_prompt += [sequence.num_prompt_tokens] * chunk.num_tokens
            for group, (pages, new_pages) in enumerate(zip(sequence.pages, chunk.new_pages, strict=True)):
                pages += new_pages
                rows.cache_positions[group] += [
                    pages[position // block_size] * block_size + position % block_size for position in where
                ]
                rows.pages[group].append(pages)
        return rows


@dataclass(frozen=True)
class PreparedStep:
    """A step that has not begun.

    Attributes:
        plan: from the front.
        sequences: the sequence of each chunk.
        rows: the step's rows if the plan names a bucket.
        batch, attention: otherwise, the layers' input, and the result of the kit's `attention_steps`.
        expert_work, policies, limits: as in `Batch`.
        seconds: time of the preparation.
    """

    plan: RankStep
    sequences: list[Sequence]
    rows: StepRows
    batch: Batch | None
    attention: list[Any]
    expert_work: list[ExpertWork] | None
    policies: StepPolicies | None
    limits: StepLimits | None
    seconds: float

    @property
    def work(self) -> RankPlan:
        return self.plan.work

    def tokens(self) -> list[int]:
        """The token ids of the rows; call it after the previous step has ended."""
        tokens: list[int] = []
        for chunk, sequence in zip(self.work.chunks, self.sequences, strict=True):
            tokens += sequence.token_ids[chunk.start : chunk.start + chunk.num_tokens]
        assert len(tokens) == len(self.rows.positions), "a plan names positions whose tokens this rank does not have"
        return tokens


@dataclass(frozen=True)
class RunningStep:
    """A step that has begun, its start time, and its future hidden states."""

    step: PreparedStep
    start: float
    hidden: HiddenRows
