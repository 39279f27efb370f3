"""Replies of `/v1/chat/completions`: content, reasoning and tool calls, whole or in chunks."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_runtime.serve.engine_messages import AddRequest
from moe_runtime.serve.openai.chat_request import ChatCompletionRequest
from moe_runtime.serve.openai.logprobs import TokenTexts
from moe_runtime.serve.openai.reply import OpenAIReply, routed
from moe_runtime.serve.values import prompt_logprobs
from moe_runtime.text.formats.output import ChatDelta, ToolCallDelta
from moe_runtime.text.formats.parser import OutputParser
from moe_runtime.types.outputs import Completion

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer
    from moe_runtime.types.outputs import OutputDelta


@dataclass
class _Call:
    """A tool call of an answer, as far as it is known."""

    id: str | None
    name: str | None
    pieces: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)

    @property
    def is_complete(self) -> bool:
        """Whether the arguments are an object. They are none if a limit or a stop string cut the call off."""
        try:
            return isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            return False


class ChatReply(OpenAIReply):
    """A reply to a chat.

    Args:
        parsers: one for each choice.
        tokenizer: for the texts of tokens.
        own_stops: tokens that end a turn in the model's format, and that the client did not name.
    """

    object_name, chunk_name = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        completion_id: str,
        model: str,
        body: ChatCompletionRequest,
        commands: Sequence[AddRequest],
        parsers: Sequence[OutputParser],
        tokenizer: Tokenizer | None,
        own_stops: Collection[int] = (),
    ) -> None:
        super().__init__(completion_id, model, body, commands)
        self._request = body
        self._parsers = parsers
        self._calls: list[list[_Call]] = [[] for _ in parsers]  # of each choice
        self._own_stops = own_stops
        self._texts = TokenTexts(tokenizer, body.skip_special_tokens)

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        reply = super().whole(completions)
        found = completions[0].prompt_logprobs
        return reply if found is None else {**reply, "prompt_logprobs": prompt_logprobs(found)}

    def first_events(self) -> Iterable[dict[str, Any]]:
        for index in range(len(self._parsers)):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def events(self, delta: OutputDelta) -> Iterable[dict[str, Any]]:
        for event in super().events(delta):
            found = delta.prompt_logprobs
            yield event if found is None else {**event, "prompt_logprobs": prompt_logprobs(found)}

    def _choice(self, index: int, done: Completion) -> dict[str, Any]:
        answer = self._parse(index, done)
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if calls := self._calls[index]:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return self._with_end(index, "message", message, done)

    def _chunk_choice(self, index: int, delta: OutputDelta) -> dict[str, Any] | None:
        content: dict[str, Any] = {}
        found = self._parse(index, delta)
        if found.content:
            content["content"] = found.content
        if found.reasoning:
            content["reasoning_content"] = found.reasoning
        if found.tool_calls:
            content["tool_calls"] = [_piece(call) for call in found.tool_calls]
        if not content and delta.finish_reason is None and delta.logprobs is None and delta.prompt_logprobs is None:
            return None
        return self._with_end(index, "delta", content, delta)

    def _parse(self, index: int, part: Completion | OutputDelta) -> ChatDelta:
        """What a part of the output adds to the answer."""
        found = self._parsers[index].feed(part.text)
        if part.finish_reason is not None:
            was_cut = part.finish_reason != "stop" or isinstance(part.stop_reason, str)
            found += self._parsers[index].finish(is_complete=not was_cut)
        found = self._wanted(found)
        calls = self._calls[index]
        for piece in found.tool_calls:
            if piece.id is not None:
                calls.append(_Call(piece.id, piece.name))
            calls[piece.index].pieces.append(piece.arguments)
        return found

    def _wanted(self, found: ChatDelta) -> ChatDelta:
        """What the client wants of a delta."""
        calls = found.tool_calls
        if not self._request.parallel_tool_calls:
            calls = tuple(call for call in calls if call.index == 0)
        return ChatDelta(found.content, found.reasoning if self._request.include_reasoning else "", calls)

    def _with_end(
        self, index: int, name: str, content: dict[str, Any], part: Completion | OutputDelta
    ) -> dict[str, Any]:
        reason = part.finish_reason
        if reason == "stop" and self._calls[index] and all(call.is_complete for call in self._calls[index]):
            reason = "tool_calls"
        num_best = self._request.top_logprobs or 0
        return {
            "index": index,
            name: content,
            "logprobs": None if part.logprobs is None else self._texts.chat(part.token_ids, part.logprobs, num_best),
            "finish_reason": reason,
            # A format's own stop tokens are to the client what the model's end of sequence is.
            "stop_reason": None if part.stop_reason in self._own_stops else part.stop_reason,
            **routed(part),
        }


def _piece(delta: ToolCallDelta) -> dict[str, Any]:
    """A piece of a call in a chunk; its first one has id, type and name."""
    function: dict[str, Any] = {"arguments": delta.arguments}
    if delta.id is None:
        return {"index": delta.index, "function": function}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name, **function}}
