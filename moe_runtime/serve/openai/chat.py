"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from moe_runtime.serve.errors import error_responses, user_error
from moe_runtime.serve.openai.answers import ChatAnswer
from moe_runtime.serve.openai.chat_reply import ChatReply
from moe_runtime.serve.openai.chat_request import ChatCompletionRequest
from moe_runtime.serve.openai.models import front_of
from moe_runtime.serve.rendering import AnswerFormat, Chat, answer_format, encode_chat
from moe_runtime.serve.requests import Front, choices_of
from moe_runtime.serve.streaming import answers, respond, until_disconnect
from moe_runtime.text.chat_history import count_calls
from moe_runtime.text.formats.parser import OutputParser
from moe_runtime.text.formats.registry import ChatFormat, grammar_around, grammar_of_calls
from moe_runtime.text.tokenizer import RenderedPrompt
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.types.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer


def answer_parser(found: ChatFormat, chat: Chat, prompt: str) -> OutputParser:
    """The parser of one choice."""
    return found.parser(
        prompt,
        chat.tools,
        calls=bool(chat.tools),
        num_earlier_calls=count_calls(chat.messages),
        continued=chat.continued,
        new_id=lambda: uuid.uuid4().hex[:24],
    )


def with_form(
    params: SamplingParams,
    body: ChatCompletionRequest,
    written: AnswerFormat,
    chat: Chat,
    prompt: str,
    tokenizer: Tokenizer | None,
) -> SamplingParams:
    """The parameters, with the form of calls that must be made. A thought may stand before any form.

    Raises:
        ValueError: the call that is asked for cannot be made.
    """
    asked, forced = params.structured_outputs, body.forced_tools()
    if tokenizer is None:
        return params
    tokens = tokenizer.added_tokens
    if forced:
        asked = StructuredOutputs(grammar=grammar_of_calls(written.format, forced, tokens, body.may_call_many))
    assert asked is not None
    around = grammar_around(written.format, prompt, chat.continued, tokens, calls=bool(forced))
    return replace(params, structured_outputs=replace(asked, within=around))


async def _prepare(
    front: Front, body: ChatCompletionRequest, written: AnswerFormat, chat: Chat, params: SamplingParams
) -> tuple[RenderedPrompt, SamplingParams]:
    """The prompt, and the parameters with the form of the answer, which is checked. Raises ValueError."""
    prompt = await encode_chat(front, chat, params)
    if params.structured_outputs is None and not body.forced_tools():
        return prompt, params
    tokenizer = front.info.tokenizer
    formed = await front.tokenising.run(lambda gone: with_form(params, body, written, chat, prompt.text, tokenizer))
    await front.check_form(formed)
    return prompt, formed


router = APIRouter(prefix="/v1")


@router.post("/chat/completions", responses=answers(ChatAnswer) | error_responses(404))
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a chat, with `n` choices."""
    front = front_of(request, body)
    renamed = {"prompt": "messages"}
    if body.max_completion_tokens is not None:
        renamed["max_tokens"] = "max_completion_tokens"
    written = answer_format(request.app.state, front.info, front.config)
    try:
        params = written.with_stops(body.sampling_params(front.info.default_sampling))
        front.check_limits(params, 1)
        chat = body.chat(front.config.max_tools)
        prompt, params = await until_disconnect(request.receive, _prepare(front, body, written, chat, params))
    except ValueError as error:
        raise user_error(error, renamed) from error
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    user, salt = front.user(body.user), front.salt(body.cache_salt)
    commands = choices_of(
        completion_id, [prompt.token_ids], params, user=user, shown_ids=written.shown_ids, cache_salt=salt
    )
    parsers = [answer_parser(written.format, chat, prompt.text) for _ in commands]
    own_stops = set(written.stop_ids) - set(body.stop_token_ids)
    reply = ChatReply(completion_id, front.info.model_name, body, commands, parsers, front.info.tokenizer, own_stops)
    return await respond(request, front.engine, commands, reply, stream=body.stream, prompt="messages")
