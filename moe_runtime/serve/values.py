"""Values in replies that all endpoints write alike: usage, log-probabilities, experts; and their shapes."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np

    from moe_runtime.types.outputs import ExpertChanges, PositionLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Answer(BaseModel):
    """The shape of a reply, for `/openapi.json`. Tests hold replies against it."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ExpertChangesAnswer(Answer):
    moved: int
    rerouted: int
    dropped: int


class PromptTokensDetails(Answer):
    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    expert_changes: ExpertChangesAnswer | None = None
    overload_routing: str | None = None


class RoutedExperts(Answer):
    data: str
    shape: list[int]
    dtype: str


class PositionLogprob(Answer):
    logprob: float
    rank: int
    decoded_token: str | None


def usage(
    num_prompt_tokens: int,
    num_output_tokens: int,
    num_cached_tokens: int,
    changes: ExpertChanges | None,
    overload_routing: str | None = None,
) -> dict[str, Any]:
    """The token counts of a request.

    Args:
        num_cached_tokens: tokens of the prompt that the prefix cache had.
        changes: None if the engine's options never change the gates' choices.
        overload_routing: the expert policy that it got because many waited, if it got one.
    """
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        **({} if changes is None else {"expert_changes": asdict(changes)}),
        **({} if overload_routing is None else {"overload_routing": overload_routing}),
    }


def routed_experts(experts: np.ndarray) -> dict[str, Any]:
    """Experts [tokens, sparse layers, experts per token] as a JSON value: base64 of the array in C order."""
    return {"data": b64encode(experts.tobytes()).decode(), "shape": list(experts.shape), "dtype": experts.dtype.name}


def finite(logprob: float) -> float:
    """A log-probability as a number that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def position_logprobs(position: PositionLogprobs) -> dict[str, dict[str, Any]]:
    """The log-probabilities of one position by token id, as vLLM writes them."""
    return {
        str(token_id): {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}
        for token_id, entry in position.items()
    }


def prompt_logprobs(positions: list[PositionLogprobs | None]) -> list[dict[str, dict[str, Any]] | None]:
    """The log-probabilities of a prompt; the first position has none."""
    return [None if position is None else position_logprobs(position) for position in positions]
