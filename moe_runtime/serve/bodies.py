"""Bodies of requests, and what answers on all routes share.

Types are checked here, ranges by `SamplingParams`, so that HTTP and Python say the same.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe_runtime.types.sampling_params import MAX_LOGPROBS, SamplingParams

if TYPE_CHECKING:
    import numpy as np

    from moe_runtime.wire.messages import ExpertChanges

LEAST_LOGPROB = -9999.0  # JSON has no infinity
SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingParams))


class Body(BaseModel):
    """JSON types as they are (no "5" for 5), and no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class RoutingFields(Body):
    """The fields of `RoutingPolicy`: a number for all sparse layers, or one for each."""

    top_k: int | list[int] | None = None
    top_p: float | list[float] | None = None
    threshold: float | list[float] | None = None
    temperature: float | list[float] | None = None


class SamplingFields(Body):
    """The fields of `SamplingParams` that mean the same on every route."""

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
    routing: str | RoutingFields | None = None
    return_routed_experts: bool = False

    def sampling_params(self) -> SamplingParams:
        """Raises ValueError where a value is out of range."""
        return SamplingParams(**self._given())

    def _given(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in SAMPLING_NAMES & self.model_fields_set}
        if isinstance(self.routing, RoutingFields):
            given["routing"] = self.routing.model_dump(exclude_unset=True)
        return given


def without_nulls(body: Any) -> Any:
    """A JSON object without its fields that are null."""
    return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class StreamOptions(Body):
    include_usage: bool = False


class OpenAIFields(Body):
    """OpenAI's routes: null means not given, and what this server cannot do may only have its neutral value."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Has no effect.")
    metadata: dict[str, Any] | None = Field(None, description="Has no effect.")
    n: Literal[1] = 1
    logit_bias: dict[str, float] = Field({}, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return without_nulls(body)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a chat, as OpenAI's clients send it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return without_nulls(body)

    def plain(self) -> dict[str, str]:
        """What a chat template takes."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **name}


class GenerateRequest(SamplingFields):
    """`POST /generate`: exactly one of prompt, prompt_token_ids and messages, and sampling parameters beside it."""

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[Message] | None = None
    stream: bool = False
    logprobs: int | None = None


class CompletionRequest(SamplingFields, OpenAIFields):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""


class ResponseFormat(Body):
    type: Literal["text"]


class ChatCompletionRequest(SamplingFields, OpenAIFields):
    """`POST /v1/chat/completions`. Without a limit of tokens, an answer may go on to the context's end."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"

    def sampling_params(self) -> SamplingParams:
        given = self._given()
        given["max_tokens"] = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        given["logprobs"] = self.top_logprobs if self.logprobs else None
        return SamplingParams(**given)


def usage(num_prompt_tokens: int, num_output_tokens: int, changes: ExpertChanges | None) -> dict[str, Any]:
    """`changes` is None where the engine's options leave the gates' choices alone."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        **({} if changes is None else {"expert_changes": asdict(changes)}),
    }


def routed_experts(experts: np.ndarray) -> dict[str, Any]:
    """Experts [tokens, sparse layers, experts per token] as JSON carries them: base64 of the array in C order."""
    return {"data": b64encode(experts.tobytes()).decode(), "shape": list(experts.shape), "dtype": experts.dtype.name}


def finite(logprob: float) -> float:
    """A log-probability as JSON can carry it."""
    return max(logprob, LEAST_LOGPROB)
