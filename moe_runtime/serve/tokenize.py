"""`/tokenize` and `/detokenize`, in vLLM's shapes. Long texts take time, so both work outside of the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import FailFast, Field

from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.bodies import Body, Message
from moe_runtime.serve.errors import ApiError, error_responses, json_response, user_error
from moe_runtime.serve.openai.models import check_model
from moe_runtime.serve.prompts import encode_chat

if TYPE_CHECKING:
    from moe_runtime.serve.engine_messages import Loaded
    from moe_runtime.text.tokenizer import Tokenizer

MAX_CHARS = 2**20
MAX_TOKENS = 2**18
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TokenizeRequest(Body):
    """A prompt, or a chat in the model's template. A template has its special tokens, so none are added to a chat."""

    model: str | None = None
    prompt: str | None = Field(None, max_length=MAX_CHARS, examples=["The sea is"])
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Tokens(Body):
    """Token ids, and with `return_token_strs` the vocabulary's entry for each."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[TokenId], FailFast(), Field(max_length=MAX_TOKENS, examples=[[504, 3575]])]


class Text(Body):
    """The text of token ids, special tokens included."""

    prompt: str


router = APIRouter(responses=error_responses(404, 422))


@router.post("/tokenize", response_model=Tokens)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The token ids of a prompt or a chat."""
    info, tokenizer = _tokenizer(request, body.model)
    try:
        if body.messages is not None and body.prompt is None:
            tokens = await encode_chat(tokenizer, body.messages)
        elif body.prompt is not None and body.messages is None:
            tokens = await asyncio.to_thread(tokenizer.encode, body.prompt, body.add_special_tokens)
        else:
            raise ValueError("prompt: exactly one of prompt and messages must be given")
    except ValueError as error:
        raise user_error(error, {}) from error
    strings = await asyncio.to_thread(tokenizer.pieces, tokens) if body.return_token_strs else None
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": info.max_model_len}
    return json_response(found | {"tokens": tokens, "token_strs": strings})


@router.post("/detokenize", response_model=Text)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    _, tokenizer = _tokenizer(request, body.model)
    return json_response({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, False)})


def _tokenizer(request: Request, model: str | None) -> tuple[Loaded, Tokenizer]:
    engine: AsyncEngine = request.app.state.engine
    info = engine.require_ready()
    check_model(model, info)
    if info.tokenizer is None:
        raise ApiError(400, "this server has no tokenizer (skip_tokenizer_init)")
    return info, info.tokenizer
