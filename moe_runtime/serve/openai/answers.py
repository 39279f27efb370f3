"""The shapes of replies of OpenAI's endpoints, for `/openapi.json`. Tests hold the replies against them."""

from __future__ import annotations

from typing import Any, Literal

from moe_runtime.serve.values import Answer, PositionLogprob, RoutedExperts, Usage

FinishReason = Literal["stop", "length", "tool_calls"]


class TextLogprobsAnswer(Answer):
    """Log-probabilities of a completion, by text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobsAnswer | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    prompt_logprobs: list[dict[str, PositionLogprob] | None] | None = None
    routed_experts: RoutedExperts | None = None


class CompletionAnswer(Answer):
    """A reply of `/v1/completions`; a chunk of a stream has the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CalledFunction(Answer):
    name: str
    arguments: str


class Call(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessageAnswer(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class TokenEntry(Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenPosition(TokenEntry):
    top_logprobs: list[TokenEntry]


class ChatLogprobsAnswer(Answer):
    """Log-probabilities of a chat."""

    content: list[TokenPosition]
    refusal: Any


class ChatChoice(Answer):
    index: int
    message: ChatMessageAnswer
    logprobs: ChatLogprobsAnswer | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    routed_experts: RoutedExperts | None = None


class ChatAnswer(Answer):
    """A reply of `/v1/chat/completions`. In the chunks of a stream, a choice has a `delta` in place of its message."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PositionLogprob] | None] | None = None
