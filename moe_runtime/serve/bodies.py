"""The common parts of request bodies and of replies on all endpoints.

Types are checked here. `SamplingParams` checks ranges, so that HTTP and Python give the same messages.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np

    from moe_runtime.types.outputs import ExpertChanges

LEAST_LOGPROB = -9999.0  # JSON has no infinity
SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingParams))


class Body(BaseModel):
    """Strict JSON types (no "5" for 5), and no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ExpertPolicyFields(Body):
    """The fields of `ExpertPolicy`: one number for all sparse layers, or one for each layer."""

    top_k: int | list[int] | None = None
    top_p: float | list[float] | None = None
    threshold: float | list[float] | None = None
    temperature: float | list[float] | None = None


class SamplingFields(Body):
    """The fields of `SamplingParams` that mean the same on every endpoint."""

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    routing: str | ExpertPolicyFields | None = None
    return_routed_experts: bool = False

    def sampling_params(self) -> SamplingParams:
        """Raises ValueError if a value is out of range."""
        return SamplingParams(**self._given())

    def _given(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in SAMPLING_NAMES & self.model_fields_set}
        if isinstance(self.routing, ExpertPolicyFields):
            given["routing"] = self.routing.model_dump(exclude_unset=True)
        return given


def without_nulls(body: Any) -> Any:
    """A JSON object without its null fields."""
    return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A chat message, as OpenAI's clients send it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return without_nulls(body)

    def plain(self) -> dict[str, str]:
        """The message in the form that a chat template takes."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **name}


def usage(num_prompt_tokens: int, num_output_tokens: int, changes: ExpertChanges | None) -> dict[str, Any]:
    """The token counts of a request. `changes` is None if the engine's options never change the gates' choices."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        **({} if changes is None else {"expert_changes": asdict(changes)}),
    }


def routed_experts(experts: np.ndarray) -> dict[str, Any]:
    """Experts [tokens, sparse layers, experts per token] as a JSON value: base64 of the array in C order."""
    return {"data": b64encode(experts.tobytes()).decode(), "shape": list(experts.shape), "dtype": experts.dtype.name}


def finite(logprob: float) -> float:
    """A log-probability as a number that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)
