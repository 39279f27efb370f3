"""What comes out of the engine: deltas per step, and finished outputs. Names are vLLM's. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability and its place among all tokens (1 is the best) at one position."""

    logprob: float
    rank: int
    decoded_token: str | None


PositionLogprobs = dict[int, Logprob]
"""Token id -> Logprob at one position: the chosen token first, then the best in order."""


@dataclass(frozen=True)
class ExpertChanges:
    """Assignments (a token's k-th expert in a layer) that limits of experts and ranks have changed.

    Moved to a near-equal expert of a lighter rank, rerouted from an expert that was full, dropped.
    """

    moved: int = 0
    rerouted: int = 0
    dropped: int = 0

    def __add__(self, other: ExpertChanges) -> ExpertChanges:
        return ExpertChanges(self.moved + other.moved, self.rerouted + other.rerouted, self.dropped + other.dropped)


@dataclass
class CompletionOutput:
    """One continuation of a prompt.

    `finish_reason` is "stop" or "length"; `stop_reason` is the stop string or stop id that ended it, None for the
    model's own end of sequence. `routed_experts`, if asked for, has the experts of every token that went through the
    model, all of prompt and output but the last: [tokens, sparse layers, experts per token], best first, in uint8 where
    that can hold them, else uint16; the type's largest value stands where one was dropped. `expert_changes` counts what
    capacity and load-aware routing have changed of them, where the engine's options let them.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    routed_experts: np.ndarray | None = None
    expert_changes: ExpertChanges | None = None


@dataclass
class RequestOutput:
    """A prompt and what was generated from it. `prompt_logprobs[0]` is None: nothing comes before the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None


@dataclass(frozen=True)
class OutputDelta:
    """What one engine step adds to one request.

    The last delta of a request has a `finish_reason`: "stop", "length", or "abort". `text` may lag behind `token_ids`:
    half a character, or what may become a stop string, is held back. The prompt's tokens come with the first delta,
    and its log-probabilities if asked for; `routed_experts` and `expert_changes` with the last, see `CompletionOutput`.
    """

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    num_prompt_tokens: int
    num_output_tokens: int
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    routed_experts: np.ndarray | None = None
    expert_changes: ExpertChanges | None = None


@dataclass
class Completion:
    """What a request's deltas add up to; attributes as those of `OutputDelta`."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    routed_experts: np.ndarray | None = None
    expert_changes: ExpertChanges | None = None

    def add(self, delta: OutputDelta) -> None:
        """Take in the next delta of the request."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        if delta.prompt_token_ids is not None:
            self.prompt_token_ids, self.prompt_logprobs = delta.prompt_token_ids, delta.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.num_prompt_tokens = delta.num_prompt_tokens
        self.routed_experts, self.expert_changes = delta.routed_experts, delta.expert_changes

    def request_output(self, request_id: str, prompt: str | None) -> RequestOutput:
        """The finished request as `LLM` gives it."""
        output = CompletionOutput(
            0,
            self.text,
            self.token_ids,
            self.logprobs,
            self.finish_reason,
            self.stop_reason,
            self.routed_experts,
            self.expert_changes,
        )
        return RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[output],
            finished=self.finish_reason is not None,
            prompt_logprobs=self.prompt_logprobs,
        )
