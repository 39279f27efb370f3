"""Outputs of the engine: deltas per step, and finished outputs. Names follow vLLM. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability and its rank among all tokens (1 is the best) at one position."""

    logprob: float
    rank: int
    decoded_token: str | None


PositionLogprobs = dict[int, Logprob]
"""Token id -> Logprob at one position: the chosen token first, then the best in order."""


@dataclass(frozen=True)
class ExpertChanges:
    """Assignments (a token's k-th expert in a layer) changed by limits on experts and ranks.

    An assignment moves to a near-equal expert on a less loaded rank, is rerouted from a full expert, or is dropped.
    """

    moved: int = 0
    rerouted: int = 0
    dropped: int = 0

    def __add__(self, other: ExpertChanges) -> ExpertChanges:
        return ExpertChanges(self.moved + other.moved, self.rerouted + other.rerouted, self.dropped + other.dropped)


@dataclass
class CompletionOutput:
    """One continuation of a prompt.

    `finish_reason` is "stop" or "length", or, with the reason in `error`, "timeout" or "error". `stop_reason` is the
    stop string or stop id that ended the output, or None for the model's own end of sequence. `routed_experts`, if
    asked for, holds the experts of every token that went through the model: all tokens of prompt and output except the
    last. Its shape is [tokens, sparse layers, experts per token], best first, in uint8 if that is large enough, else
    uint16. The type's largest value marks a dropped expert. `expert_changes` counts the assignments that capacity
    limits and `balance_epsilon` have changed, if they are set.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    routed_experts: np.ndarray | None = None
    expert_changes: ExpertChanges | None = None
    error: str | None = None


@dataclass
class RequestOutput:
    """A prompt and its `n` outputs. `prompt_logprobs[0]` is None: no token precedes the first one.

    `num_cached_tokens` are tokens of the prompt that the first output took from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class OutputDelta:
    """The output that one engine step adds to one request.

    The last delta of a request has a `finish_reason`: "stop", "length", "abort", or with an `error`, "timeout",
    "queue_timeout" or "error". `text` may lag behind `token_ids`: an incomplete character, or text that may become a
    stop string, is held back. The first delta has the prompt's tokens, and their log-probabilities if asked for, and
    `scheduled_at`, the `time.monotonic()` at which the request's first step was planned. `num_cached_tokens` counts
    tokens of the prompt that were not computed, as the prefix cache had them. The last has `routed_experts` and
    `expert_changes`, see `CompletionOutput`, and `overload_routing`: the expert policy that the request got because
    many waited.
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
    error: str | None = None
    scheduled_at: float | None = None
    num_cached_tokens: int = 0
    overload_routing: str | None = None


@dataclass
class Completion:
    """The sum of a request's deltas. Attributes are those of `OutputDelta`. Adding takes linear time."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    routed_experts: np.ndarray | None = None
    expert_changes: ExpertChanges | None = None
    error: str | None = None
    overload_routing: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, delta: OutputDelta) -> None:
        """Add the next delta of the request."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = [] if self.logprobs is None else self.logprobs
            self.logprobs += delta.logprobs
        if delta.prompt_token_ids is not None:
            self.prompt_token_ids, self.prompt_logprobs = delta.prompt_token_ids, delta.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.num_prompt_tokens, self.num_cached_tokens = delta.num_prompt_tokens, delta.num_cached_tokens
        self.routed_experts, self.expert_changes = delta.routed_experts, delta.expert_changes
        self.error, self.overload_routing = delta.error, delta.overload_routing

    def output(self, index: int) -> CompletionOutput:
        """The finished request as the `index`-th continuation of its prompt."""
        return CompletionOutput(
            index,
            self.text,
            self.token_ids,
            self.logprobs,
            self.finish_reason,
            self.stop_reason,
            self.routed_experts,
            self.expert_changes,
            self.error,
        )


def request_output(request_id: str, prompt: str | None, choices: Sequence[Completion]) -> RequestOutput:
    """The finished continuations of a prompt as `LLM` returns them."""
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=choices[0].prompt_token_ids,
        outputs=[choice.output(index) for index, choice in enumerate(choices)],
        finished=all(choice.finish_reason is not None for choice in choices),
        prompt_logprobs=choices[0].prompt_logprobs,
        num_cached_tokens=choices[0].num_cached_tokens,
    )
