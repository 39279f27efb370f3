"""`POST /generate`: the runtime's own endpoint."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from moe_runtime.serve.bodies import FirstErrorList, SamplingFields, TokenIds
from moe_runtime.serve.chat_messages import MAX_MESSAGES, Message
from moe_runtime.serve.errors import ApiError, user_error
from moe_runtime.serve.prompts import require_tokenizer, text_source
from moe_runtime.serve.rendering import Chat, encode_chat
from moe_runtime.serve.requests import Front, choices_of
from moe_runtime.serve.streaming import answers, respond, until_disconnect
from moe_runtime.serve.values import (
    Answer,
    PositionLogprob,
    RoutedExperts,
    Usage,
    position_logprobs,
    prompt_logprobs,
    routed_experts,
    usage,
)
from moe_runtime.types.outputs import Completion
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.types.outputs import OutputDelta

PROMPTS = ("prompt", "prompt_token_ids", "messages")


class GenerateRequest(SamplingFields):
    """`POST /generate`: exactly one of prompt, prompt_token_ids and messages, plus sampling parameters."""

    prompt: str | None = None
    prompt_token_ids: TokenIds | None = None
    messages: Annotated[FirstErrorList[Message], Field(max_length=MAX_MESSAGES)] | None = None
    stream: bool = False
    logprobs: int | None = None


class GenerateAnswer(Answer):
    """A reply of `/generate`. In a stream, only the last event has `stop_reason` and `usage`."""

    id: str
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None
    logprobs: list[dict[str, PositionLogprob]] | None = None
    prompt_logprobs: list[dict[str, PositionLogprob] | None] | None = None
    routed_experts: RoutedExperts | None = None
    stop_reason: int | str | None
    usage: Usage


class NativeReply:
    """Replies of `/generate`."""

    def __init__(self, request_id: str) -> None:
        self._id = request_id

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        (done,) = completions
        return self._body(done) | self._end(done, len(done.token_ids))

    def first_events(self) -> Iterable[dict[str, Any]]:
        return ()

    def events(self, delta: OutputDelta) -> Iterable[dict[str, Any]]:
        end = {} if delta.finish_reason is None else self._end(delta, delta.num_output_tokens)
        yield self._body(delta) | end

    def last_events(self) -> Iterable[dict[str, Any]]:
        return ()

    def _body(self, part: Completion | OutputDelta) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": self._id,
            "text": part.text,
            "token_ids": part.token_ids,
            "finish_reason": part.finish_reason,
        }
        if part.logprobs is not None:
            body["logprobs"] = [position_logprobs(position) for position in part.logprobs]
        if part.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(part.prompt_logprobs)
        if part.routed_experts is not None:
            body["routed_experts"] = routed_experts(part.routed_experts)
        return body

    def _end(self, part: Completion | OutputDelta, num_output_tokens: int) -> dict[str, Any]:
        counts = usage(
            part.num_prompt_tokens,
            num_output_tokens,
            part.num_cached_tokens,
            part.expert_changes,
            part.overload_routing,
        )
        return {"stop_reason": part.stop_reason, "usage": counts}


router = APIRouter()


@router.post("/generate", responses=answers(GenerateAnswer))
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Continue one prompt."""
    given = [name for name in PROMPTS if getattr(body, name) is not None]
    if len(given) != 1:
        field = given[0] if given else PROMPTS[0]
        found = " and ".join(given) or "none"
        raise ApiError(400, f"{field}: exactly one of {', '.join(PROMPTS)} must be given, not {found}", field)
    front = Front.of(request)
    try:
        params = body.sampling_params(front.info.default_sampling)
        front.check_limits(params, 1)
        prompt = await until_disconnect(request.receive, _prompt(front, body, params))
    except ValueError as error:
        raise user_error(error, {"prompt": given[0]}) from error
    request_id = f"gen-{uuid.uuid4().hex}"
    user, salt = front.user(body.user), front.salt(body.cache_salt)
    (command,) = choices_of(request_id, [prompt], params, user=user, cache_salt=salt)
    return await respond(request, front.engine, [command], NativeReply(request_id), stream=body.stream, prompt=given[0])


async def _prompt(front: Front, body: GenerateRequest, params: SamplingParams) -> list[int]:
    await front.check_form(params)
    if body.messages is not None:
        return (await encode_chat(front, Chat([message.plain() for message in body.messages]), params)).token_ids
    if body.prompt is None:
        assert body.prompt_token_ids is not None
        token_ids: list[int] = body.prompt_token_ids
        return token_ids
    tokenizer = require_tokenizer(front.info.tokenizer, "prompt")
    source = text_source(tokenizer, body.prompt, front.info.rules, params, front.key)
    return (await front.tokenising.prompt(tokenizer, source)).token_ids
