"""What replies of OpenAI's endpoints share: the object around the choices, and the usage."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from moe_runtime.serve.engine_messages import AddRequest
from moe_runtime.serve.openai.fields import OpenAIFields
from moe_runtime.serve.values import routed_experts, usage
from moe_runtime.types.outputs import Completion

if TYPE_CHECKING:
    from moe_runtime.types.outputs import ExpertChanges, OutputDelta


class OpenAIReply:
    """A reply with one choice for each of the engine's requests.

    Args:
        completion_id: the reply's id.
        model: the served name.
        body: the client's request.
        commands: the engine's requests, in the order of the choices: `body.n` for each prompt.
    """

    object_name: str
    chunk_name: str

    def __init__(self, completion_id: str, model: str, body: OpenAIFields, commands: Sequence[AddRequest]) -> None:
        self._id = completion_id
        self._model = model
        self._created = int(time.time())
        self._body = body
        self._indices = {command.request_id: index for index, command in enumerate(commands)}
        self._num_prompt_tokens = sum(len(command.prompt) for command in commands[:: body.n])
        self._num_output_tokens = [0] * len(commands)
        self._num_cached_tokens = [0] * len(commands)
        self._changes: ExpertChanges | None = None
        self._overload_routing: str | None = None  # of any choice

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The reply that is not streamed."""
        for index, done in enumerate(completions):
            self._count(index, done, len(done.token_ids))
        choices = [self._choice(index, done) for index, done in enumerate(completions)]
        return {**self._frame(self.object_name, choices), "usage": self._usage()}

    def first_events(self) -> Iterable[dict[str, Any]]:
        return ()

    def events(self, delta: OutputDelta) -> Iterable[dict[str, Any]]:
        index = self._indices[delta.request_id]
        self._count(index, delta, delta.num_output_tokens)
        choice = self._chunk_choice(index, delta)
        if choice is not None:
            yield self._chunk([choice])

    def last_events(self) -> Iterable[dict[str, Any]]:
        if self._body.include_usage:
            yield {**self._chunk([]), "usage": self._usage()}

    def _choice(self, index: int, done: Completion) -> dict[str, Any]:
        """A choice of a whole reply."""
        raise NotImplementedError

    def _chunk_choice(self, index: int, delta: OutputDelta) -> dict[str, Any] | None:
        """A choice's part in a chunk, or None if there is nothing to say yet."""
        raise NotImplementedError

    def _frame(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        counts: dict[str, Any] = {}
        if self._body.include_usage:
            counts = {"usage": self._usage() if self._body.usage_in_every_chunk else None}
        return {**self._frame(self.chunk_name, choices), **counts}

    def _count(self, index: int, part: Completion | OutputDelta, num_output_tokens: int) -> None:
        self._num_output_tokens[index] = num_output_tokens
        self._num_cached_tokens[index] = part.num_cached_tokens
        if part.expert_changes is not None:
            self._changes = part.expert_changes if self._changes is None else self._changes + part.expert_changes

        self._overload_routing = part.overload_routing or self._overload_routing

    def _usage(self) -> dict[str, Any]:
        # A prompt is counted once, so of its choices the first one's count applies.
        num_cached_tokens = sum(self._num_cached_tokens[:: self._body.n])
        num_output_tokens = sum(self._num_output_tokens)
        return usage(
            self._num_prompt_tokens, num_output_tokens, num_cached_tokens, self._changes, self._overload_routing
        )


def routed(part: Completion | OutputDelta) -> dict[str, Any]:
    """The field `routed_experts` of a choice, if it was asked for."""
    return {} if part.routed_experts is None else {"routed_experts": routed_experts(part.routed_experts)}
