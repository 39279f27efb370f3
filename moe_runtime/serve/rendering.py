"""A chat as the model reads it: its messages in the model's template, and the format of the model's answers."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from starlette.datastructures import State

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.engine_messages import Loaded
from moe_runtime.serve.prompt_cache import prompt_key
from moe_runtime.serve.prompts import PIECE_CHARS, Source, check_size, require_tokenizer
from moe_runtime.serve.requests import Front
from moe_runtime.text.formats.registry import ChatFormat, choose_format
from moe_runtime.text.tokenizer import RenderedPrompt
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chat:
    """A conversation to answer.

    Attributes:
        messages: in OpenAI's shapes, as plain values.
        tools: OpenAI's tool objects.
        add_generation_prompt: end with the beginning of an assistant's turn.
        continue_final_message: leave the last message open.
        add_special_tokens: add the tokenizer's special tokens to those of the template.
        template_kwargs: further variables of the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def continued(self) -> str:
        """The final message's content, if the model continues it."""
        return (self.messages[-1].get("content") or "") if self.continue_final_message else ""


@dataclass(frozen=True)
class AnswerFormat:
    """What the model writes in a chat.

    Attributes:
        format: of tool calls and reasoning.
        shown_ids: special tokens that its parser must see.
        stop_ids: tokens that end a turn besides the model's own.
    """

    format: ChatFormat
    shown_ids: frozenset[int]
    stop_ids: tuple[int, ...]

    def with_stops(self, params: SamplingParams) -> SamplingParams:
        """The parameters with the format's own stop tokens."""
        if params.ignore_eos or not self.stop_ids:
            return params
        return replace(params, stop_token_ids=[*params.stop_token_ids, *self.stop_ids])


def answer_format(state: State, info: Loaded, config: ServerConfig) -> AnswerFormat:
    """What the model writes; chosen once for an application.

    Raises:
        ValueError: an option names a format that does not exist.
    """
    if not hasattr(state, "answer_format"):
        tokenizer = info.tokenizer
        tokens: Mapping[str, int] = {} if tokenizer is None else tokenizer.added_tokens
        template = None if tokenizer is None else tokenizer.chat_template
        source = None if template is None else template.source(has_tools=True)
        found = choose_format(info.family, source, tokens, config.tool_call_parser, config.reasoning_parser)
        shown, stops = ([tokens[text] for text in texts] for texts in (found.shown_tokens, found.stop_tokens))
        state.answer_format = AnswerFormat(found, frozenset(shown), tuple(stops))
    answers: AnswerFormat = state.answer_format
    return answers


async def encode_chat(front: Front, chat: Chat, params: SamplingParams) -> RenderedPrompt:
    """The text and tokens of a chat.

    Raises:
        ValueError: there is no tokenizer or template, the template refuses the messages, or the chat is too long.
    """
    tokenizer = require_tokenizer(front.info.tokenizer, "messages")
    texts = [message.get("content") or "" for message in chat.messages]
    num_chars = sum(map(len, texts))

    def make(gone: threading.Event) -> str | RenderedPrompt:
        check_size(tokenizer, texts, front.info.rules, params, gone)
        rendered = tokenizer.render_chat(chat.messages, **_options(chat, front.config.escape_special_tokens))
        return rendered.text if chat.add_special_tokens and isinstance(rendered, RenderedPrompt) else rendered

    key = None
    template = tokenizer.chat_template
    if num_chars <= PIECE_CHARS and template is not None and not template.tells_time:
        key = prompt_key(front.key, "chat", asdict(chat))
    return await front.tokenising.prompt(tokenizer, Source(make, num_chars, chat.add_special_tokens, key))


def render(tokenizer: Tokenizer, chat: Chat, escape_special_tokens: bool) -> RenderedPrompt:
    """The text and tokens of a chat. Raises ValueError as `encode_chat`."""
    prompt = tokenizer.apply_chat_template(chat.messages, **_options(chat, escape_special_tokens))
    return replace(prompt, token_ids=tokenizer.encode(prompt.text)) if chat.add_special_tokens else prompt


def _options(chat: Chat, escape_special_tokens: bool) -> dict[str, Any]:
    return {
        "tools": chat.tools,
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
        "template_kwargs": chat.template_kwargs,
        "escape_special_tokens": escape_special_tokens,
    }
