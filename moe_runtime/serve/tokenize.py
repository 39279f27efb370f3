"""`/tokenize` and `/detokenize`, in vLLM's shapes. Long texts take time, so both work outside of the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import FailFast, Field

from moe_runtime.serve.bodies import Body, FirstErrorList
from moe_runtime.serve.chat_messages import MAX_MESSAGES, Message, Tool
from moe_runtime.serve.errors import ApiError, error_responses, json_response, user_error
from moe_runtime.serve.openai.models import check_model
from moe_runtime.serve.rendering import Chat, render
from moe_runtime.serve.requests import Front
from moe_runtime.serve.streaming import until_disconnect

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer

MAX_CHARS = 2**20
MAX_TOKENS = 2**18
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TokenizeRequest(Body):
    """A prompt, or a chat in the model's template. Special tokens are added to a prompt unless `add_special_tokens` is
    false, and to a chat only if it is true: the template has its own."""

    model: str | None = None
    prompt: str | None = Field(None, max_length=MAX_CHARS, examples=["The sea is"])
    messages: Annotated[FirstErrorList[Message], Field(max_length=MAX_MESSAGES)] | None = None
    tools: FirstErrorList[Tool] = Field(default_factory=list, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
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


router = APIRouter(responses=error_responses(404))


@router.post("/tokenize", response_model=Tokens)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The token ids of a prompt or a chat."""
    front, tokenizer = _tokenizer(request, body.model)
    try:
        tokens = await until_disconnect(
            request.receive, front.tokenising.run(lambda gone: _encode(front, tokenizer, body))
        )
    except ValueError as error:
        raise user_error(error, {}) from error
    strings = tokenizer.pieces(tokens) if body.return_token_strs else None
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": front.info.max_model_len}
    return json_response(found | {"tokens": tokens, "token_strs": strings})


def _encode(front: Front, tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ValueError("prompt: exactly one of prompt and messages must be given")
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, body.add_special_tokens is not False)
    chat = Chat(
        messages=[message.plain() for message in body.messages or ()],
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens is True,
        template_kwargs=body.chat_template_kwargs,
    )
    if sum(len(message["content"] or "") for message in chat.messages) > MAX_CHARS:
        raise ValueError(f"messages: are too long; they must have at most {MAX_CHARS} characters")
    return render(tokenizer, chat, front.config.escape_special_tokens).token_ids


@router.post("/detokenize", response_model=Text)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    front, tokenizer = _tokenizer(request, body.model)
    text = await front.tokenising.run(lambda gone: tokenizer.decode(body.tokens, skip_special_tokens=False))
    return json_response({"prompt": text})


def _tokenizer(request: Request, model: str | None) -> tuple[Front, Tokenizer]:
    front = Front.of(request)
    check_model(model, front.info)
    if front.info.tokenizer is None:
        raise ApiError(400, "this server has no tokenizer (skip_tokenizer_init)")
    return front, front.info.tokenizer
