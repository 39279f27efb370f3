"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import PlainValidator, WithJsonSchema

from moe_runtime.serve.bodies import IDS, TEXT, is_token_ids, wrong
from moe_runtime.serve.engine_messages import AddRequest
from moe_runtime.serve.errors import error_responses, user_error
from moe_runtime.serve.openai.answers import CompletionAnswer
from moe_runtime.serve.openai.fields import OpenAIFields
from moe_runtime.serve.openai.logprobs import TextLogprobs, TokenTexts
from moe_runtime.serve.openai.models import front_of
from moe_runtime.serve.openai.reply import OpenAIReply, routed
from moe_runtime.serve.prompts import require_tokenizer, text_source
from moe_runtime.serve.requests import Front, choices_of
from moe_runtime.serve.streaming import answers, respond, until_disconnect
from moe_runtime.serve.values import prompt_logprobs
from moe_runtime.types.outputs import Completion
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer
    from moe_runtime.types.outputs import OutputDelta, PositionLogprobs


def _prompt(value: Any) -> Any:
    if isinstance(value, str) or is_token_ids(value):
        return value
    if isinstance(value, list) and (
        all(isinstance(prompt, str) for prompt in value) or all(is_token_ids(prompt) for prompt in value)
    ):
        return value
    raise wrong("a text, token ids, or a list of either")


PROMPT_SCHEMA = {
    "anyOf": [TEXT, IDS, {"type": "array", "items": TEXT}, {"type": "array", "items": IDS}],
    "examples": ["The sea is"],
}
Prompt = Annotated[Any, PlainValidator(_prompt), WithJsonSchema(PROMPT_SCHEMA)]


class CompletionRequest(OpenAIFields):
    """`POST /v1/completions`."""

    prompt: Prompt
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Raises ValueError if a value is out of range."""
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of: {self.best_of} is not supported; it must be left out, or n ({self.n})")
        params = {**defaults, **self._given()}
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            params["prompt_logprobs"] = self.logprobs
        return SamplingParams(**params, **self._form())

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each a text or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return prompt
        return [prompt]


class CompletionReply(OpenAIReply):
    """Replies of `/v1/completions`.

    Args:
        texts: the text of each prompt, for `echo`.
        tokenizer: for the texts of tokens.
    """

    object_name = chunk_name = "text_completion"

    def __init__(
        self,
        completion_id: str,
        model: str,
        body: CompletionRequest,
        commands: Sequence[AddRequest],
        texts: Sequence[str],
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__(completion_id, model, body, commands)
        self._request = body
        self._texts = texts
        tokens = TokenTexts(tokenizer, body.skip_special_tokens)
        self._logprobs = [TextLogprobs(tokens) for _ in commands]

    def _choice(self, index: int, done: Completion) -> dict[str, Any]:
        return self._part(index, done, done.prompt_token_ids)

    def _chunk_choice(self, index: int, delta: OutputDelta) -> dict[str, Any]:
        return self._part(index, delta, delta.prompt_token_ids)

    def _part(self, index: int, part: Completion | OutputDelta, prompt: list[int] | None) -> dict[str, Any]:
        """A choice, or its part in a chunk; `prompt` is None after the first one."""
        text, token_ids = part.text, part.token_ids
        logprobs: list[PositionLogprobs | None] | None = None if part.logprobs is None else [*part.logprobs]
        shown = ""
        if self._request.echo and prompt is not None:
            number = index // self._request.n
            shown = self._texts[number] if isinstance(self._request.prompts[number], str) else ""
            text = self._texts[number] + text
            if logprobs is not None and part.prompt_logprobs is not None:
                token_ids, logprobs = [*prompt, *token_ids], [*part.prompt_logprobs, *logprobs]
        choice = {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else self._logprobs[index].part(token_ids, logprobs, shown),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
            **routed(part),
        }
        if self._request.prompt_logprobs is not None and part.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(part.prompt_logprobs)
        return choice


router = APIRouter(prefix="/v1")


@router.post("/completions", responses=answers(CompletionAnswer) | error_responses(404))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one or more prompts, with `n` choices for each."""
    front = front_of(request, body)
    try:
        params = body.sampling_params(front.info.default_sampling)
        front.check_limits(params, len(body.prompts))
        encoded = await until_disconnect(request.receive, _encode_all(front, body, params))
    except ValueError as error:
        raise user_error(error, {}) from error
    prompts, texts = [list(each) for each in zip(*encoded, strict=True)]
    completion_id = f"cmpl-{uuid.uuid4().hex}"
    user, salt = front.user(body.user), front.salt(body.cache_salt)
    commands = choices_of(completion_id, prompts, params, user=user, every_prompt_logprobs=body.echo, cache_salt=salt)
    reply = CompletionReply(completion_id, front.info.model_name, body, commands, texts, front.info.tokenizer)
    return await respond(request, front.engine, commands, reply, stream=body.stream, prompt="prompt")


async def _encode_all(front: Front, body: CompletionRequest, params: SamplingParams) -> list[tuple[list[int], str]]:
    """`_encode` of all prompts. The first error ends the work for all."""
    await front.check_form(params)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_encode(front, body, prompt, params)) for prompt in body.prompts]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _encode(
    front: Front, body: CompletionRequest, prompt: str | list[int], params: SamplingParams
) -> tuple[list[int], str]:
    """Token ids of a prompt and, for `echo`, its text."""
    rules, tokenizer = front.info.rules, front.info.tokenizer
    if isinstance(prompt, str):
        tokenizer = require_tokenizer(tokenizer, "prompt")
        source = text_source(tokenizer, prompt, rules, params, front.key, body.add_special_tokens is not False)
        return (await front.tokenising.prompt(tokenizer, source)).token_ids, prompt
    if not body.echo or tokenizer is None:
        return prompt, ""
    rules.check(prompt, params)  # the engine does so too, but ids that do not exist have no text
    decode = tokenizer.decode
    return prompt, await front.tokenising.run(lambda gone: decode(prompt, body.skip_special_tokens))
