"""`POST /generate`: the runtime's own endpoint."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.bodies import Message, SamplingFields, finite, routed_experts, usage
from moe_runtime.serve.engine_messages import AddRequest
from moe_runtime.serve.errors import ApiError, user_error
from moe_runtime.serve.prompts import encode_chat, encode_text
from moe_runtime.serve.streaming import respond
from moe_runtime.types.outputs import Completion

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer
    from moe_runtime.types.outputs import OutputDelta, PositionLogprobs

PROMPTS = ("prompt", "prompt_token_ids", "messages")


class GenerateRequest(SamplingFields):
    """`POST /generate`: exactly one of prompt, prompt_token_ids and messages, plus sampling parameters."""

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[Message] | None = None
    stream: bool = False
    logprobs: int | None = None


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
            body["logprobs"] = [_position(position) for position in part.logprobs]
        if part.prompt_logprobs is not None:
            body["prompt_logprobs"] = [position and _position(position) for position in part.prompt_logprobs]
        if part.routed_experts is not None:
            body["routed_experts"] = routed_experts(part.routed_experts)
        return body

    def _end(self, part: Completion | OutputDelta, num_output_tokens: int) -> dict[str, Any]:
        counts = usage(part.num_prompt_tokens, num_output_tokens, part.expert_changes)
        return {"stop_reason": part.stop_reason, "usage": counts}


def _position(position: PositionLogprobs) -> dict[str, dict[str, Any]]:
    return {
        str(token_id): {
            "logprob": finite(entry.logprob),
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
        }
        for token_id, entry in position.items()
    }


router = APIRouter()


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Continue one prompt."""
    engine: AsyncEngine = request.app.state.engine
    given = [name for name in PROMPTS if getattr(body, name) is not None]
    if len(given) != 1:
        field = given[0] if given else PROMPTS[0]
        found = " and ".join(given) or "none"
        raise ApiError(400, f"{field}: exactly one of {', '.join(PROMPTS)} must be given, not {found}", field)
    tokenizer = engine.require_ready().tokenizer
    try:
        command = AddRequest(f"gen-{uuid.uuid4().hex}", await _prompt(body, tokenizer), body.sampling_params())
    except ValueError as error:
        raise user_error(error, {"prompt": given[0]}) from error
    return await respond(
        request, engine, [command], NativeReply(command.request_id), stream=body.stream, prompt=given[0]
    )


async def _prompt(body: GenerateRequest, tokenizer: Tokenizer | None) -> list[int]:
    if body.messages is not None:
        return await encode_chat(tokenizer, body.messages)
    if body.prompt is not None:
        return await encode_text(tokenizer, body.prompt)
    assert body.prompt_token_ids is not None
    return body.prompt_token_ids
