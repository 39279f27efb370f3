"""OpenAI's endpoints `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.engine_messages import AddRequest
from moe_runtime.serve.errors import user_error
from moe_runtime.serve.openai.models import check_model
from moe_runtime.serve.openai.protocol import ChatCompletionRequest, CompletionRequest
from moe_runtime.serve.openai.replies import ChatReply, CompletionReply
from moe_runtime.serve.prompts import encode_chat, encode_text
from moe_runtime.serve.streaming import respond

router = APIRouter(prefix="/v1")


@router.post("/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one or more prompts, with one choice for each."""
    engine = _engine(request)
    info = engine.require_ready()
    check_model(body.model, info)
    completion_id = f"cmpl-{uuid.uuid4().hex}"
    try:
        params = body.sampling_params()
        commands = [
            AddRequest(
                f"{completion_id}-{index}",
                await encode_text(info.tokenizer, prompt) if isinstance(prompt, str) else prompt,
                params,
            )
            for index, prompt in enumerate(_prompts(body))
        ]
    except ValueError as error:
        raise user_error(error, {}) from error
    ids = [command.request_id for command in commands]
    reply = CompletionReply(completion_id, info.model_name, body.include_usage, ids)
    return await respond(request, engine, commands, reply, stream=body.stream, prompt="prompt")


@router.post("/chat/completions")
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a chat."""
    engine = _engine(request)
    info = engine.require_ready()
    check_model(body.model, info)
    renamed = {"prompt": "messages"}
    if body.max_completion_tokens is not None:
        renamed["max_tokens"] = "max_completion_tokens"
    try:
        params = body.sampling_params()
        prompt = await encode_chat(info.tokenizer, body.messages)
    except ValueError as error:
        raise user_error(error, renamed) from error
    command = AddRequest(f"chatcmpl-{uuid.uuid4().hex}", prompt, params)
    reply = ChatReply(command.request_id, info.model_name, body.include_usage, body.top_logprobs)
    return await respond(request, engine, [command], reply, stream=body.stream, prompt="messages")


def _engine(request: Request) -> AsyncEngine:
    engine: AsyncEngine = request.app.state.engine
    return engine


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    """One or more prompts, each a text or token ids."""
    prompt: Any = body.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt
    return [prompt]
