"""Request bodies of OpenAI's endpoints."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from moe_runtime.serve.bodies import Body, Message, SamplingFields, without_nulls
from moe_runtime.types.sampling_params import MAX_LOGPROBS, SamplingParams


class StreamOptions(Body):
    include_usage: bool = False


class OpenAIFields(Body):
    """Fields of OpenAI's endpoints. Null means not given. An unsupported field may only have its neutral value."""

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
    """`POST /v1/chat/completions`. Without a token limit, the output may continue to the end of the context."""

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
