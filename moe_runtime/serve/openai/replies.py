"""OpenAI's formats of completions and chat completions, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from moe_runtime.serve.bodies import finite, routed_experts, usage
from moe_runtime.types.outputs import Completion

if TYPE_CHECKING:
    from moe_runtime.types.outputs import ExpertChanges, Logprob, OutputDelta, PositionLogprobs


class _Reply:
    """Common to both endpoints: the object around the choices, and the usage that ends a stream if asked for."""

    object_name: str
    chunk_name: str

    def __init__(self, completion_id: str, model: str, include_usage: bool) -> None:
        self._id = completion_id
        self._model = model
        self._created = int(time.time())
        self._include_usage = include_usage
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._changes: ExpertChanges | None = None

    def _frame(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _whole(self, completions: Sequence[Completion], choices: list[dict[str, Any]]) -> dict[str, Any]:
        for done in completions:
            self._count(done, len(done.token_ids))
        return {**self._frame(self.object_name, choices), "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        no_usage = {"usage": None} if self._include_usage else {}
        return {**self._frame(self.chunk_name, choices), **no_usage}

    def _count_last(self, delta: OutputDelta) -> None:
        if delta.finish_reason is not None:
            self._count(delta, delta.num_output_tokens)

    def _count(self, part: Completion | OutputDelta, num_output_tokens: int) -> None:
        self._num_prompt_tokens += part.num_prompt_tokens
        self._num_output_tokens += num_output_tokens
        if part.expert_changes is not None:
            self._changes = part.expert_changes if self._changes is None else self._changes + part.expert_changes

    def _usage(self) -> dict[str, Any]:
        return usage(self._num_prompt_tokens, self._num_output_tokens, self._changes)

    def last_events(self) -> Iterable[dict[str, Any]]:
        if self._include_usage:
            yield {**self._chunk([]), "usage": self._usage()}


class CompletionReply(_Reply):
    """Replies of `/v1/completions`: one choice for each of `request_ids`, in their order."""

    object_name = chunk_name = "text_completion"

    def __init__(self, completion_id: str, model: str, include_usage: bool, request_ids: Sequence[str]) -> None:
        super().__init__(completion_id, model, include_usage)
        self._indices = {request_id: index for index, request_id in enumerate(request_ids)}
        self._offsets = [0] * len(request_ids)

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        return self._whole(completions, [self._choice(index, done) for index, done in enumerate(completions)])

    def first_events(self) -> Iterable[dict[str, Any]]:
        return ()

    def events(self, delta: OutputDelta) -> Iterable[dict[str, Any]]:
        self._count_last(delta)
        yield self._chunk([self._choice(self._indices[delta.request_id], delta)])

    def _choice(self, index: int, part: Completion | OutputDelta) -> dict[str, Any]:
        return {
            "index": index,
            "text": part.text,
            "logprobs": None if part.logprobs is None else self._logprobs(index, part.token_ids, part.logprobs),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
            **_routed(part),
        }

    def _logprobs(self, index: int, token_ids: list[int], logprobs: list[PositionLogprobs]) -> dict[str, Any]:
        chosen = [position[token_id] for token_id, position in zip(token_ids, logprobs, strict=True)]
        tokens = [_token_text(token_id, entry) for token_id, entry in zip(token_ids, chosen, strict=True)]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [finite(entry.logprob) for entry in chosen],
            "top_logprobs": [
                {_token_text(token_id, entry): finite(entry.logprob) for token_id, entry in position.items()}
                for position in logprobs
            ],
            "text_offset": offsets,
        }


class ChatReply(_Reply):
    """Replies of `/v1/chat/completions`. Each position lists the `num_top_logprobs` best tokens."""

    object_name, chunk_name = "chat.completion", "chat.completion.chunk"

    def __init__(self, completion_id: str, model: str, include_usage: bool, num_top_logprobs: int) -> None:
        super().__init__(completion_id, model, include_usage)
        self._num_top_logprobs = num_top_logprobs

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        message = {"role": "assistant", "content": completions[0].text, "refusal": None}
        return self._whole(completions, [self._choice("message", message, completions[0])])

    def first_events(self) -> Iterable[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        yield self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def events(self, delta: OutputDelta) -> Iterable[dict[str, Any]]:
        self._count_last(delta)
        yield self._chunk([self._choice("delta", {"content": delta.text}, delta)])

    def _choice(self, name: str, content: dict[str, Any], part: Completion | OutputDelta) -> dict[str, Any]:
        return {
            "index": 0,
            name: content,
            "logprobs": None if part.logprobs is None else self._logprobs(part.token_ids, part.logprobs),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
            **_routed(part),
        }

    def _logprobs(self, token_ids: list[int], logprobs: list[PositionLogprobs]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **_token(token_id, position[token_id]),
                    "top_logprobs": [
                        _token(other_id, entry)
                        for other_id, entry in position.items()
                        if entry.rank <= self._num_top_logprobs
                    ],
                }
                for token_id, position in zip(token_ids, logprobs, strict=True)
            ],
            "refusal": None,
        }


def _routed(part: Completion | OutputDelta) -> dict[str, Any]:
    return {} if part.routed_experts is None else {"routed_experts": routed_experts(part.routed_experts)}


def _token(token_id: int, entry: Logprob) -> dict[str, Any]:
    text = _token_text(token_id, entry)
    return {"token": text, "logprob": finite(entry.logprob), "bytes": list(text.encode())}


def _token_text(token_id: int, entry: Logprob) -> str:
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token
