"""A request's way to the engine, which all protocols share: its limits, its prompts' tokens, its choices."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from fastapi import Request

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.access import KEY_ID
from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.bodies import SamplingFields
from moe_runtime.serve.engine_messages import AddRequest, Loaded
from moe_runtime.serve.prompts import Tokenising
from moe_runtime.types.sampling_params import SamplingParams


def engine_of(request: Request) -> AsyncEngine:
    """The application's engine, in whatever state it is."""
    engine: AsyncEngine = request.app.state.engine
    return engine


@dataclass(frozen=True)
class Front:
    """What a route needs of the application.

    Attributes:
        engine: accepts requests.
        info: what the engine reported when it was loaded.
        config: the server's options.
        tokenising: where tokenizers work.
    """

    engine: AsyncEngine
    info: Loaded
    config: ServerConfig
    tokenising: Tokenising

    @classmethod
    def of(cls, request: Request) -> Front:
        """Raises UnavailableError unless the engine accepts requests."""
        state, engine = request.app.state, engine_of(request)
        return cls(engine, engine.require_ready(), state.server_config, state.tokenising)

    def check_limits(self, params: SamplingParams, num_prompts: int) -> None:
        """Raise ValueError for a request that asks for more than the server's options allow."""
        config = self.config
        _check("prompt", num_prompts, "prompts", "max_prompts_per_request", config.max_prompts_per_request)
        _check("n", params.n, "choices", "max_choices", config.max_choices)
        most = max(config.max_prompts_per_request, config.max_choices)
        if num_prompts * params.n > most:
            raise ValueError(f"n: {params.n} choices of {num_prompts} prompts are too many; it must be at most {most}")
        _check("stop", len(params.stop), "strings", "max_stop_strings", config.max_stop_strings)
        longest = max(map(len, params.stop), default=0)
        _check("stop", longest, "characters in a string", "max_stop_chars", config.max_stop_chars)
        _check("logit_bias", len(params.logit_bias or ()), "tokens", "max_logit_bias", config.max_logit_bias)
        _check("stop_token_ids", len(params.stop_token_ids), "tokens", "max_logit_bias", config.max_logit_bias)


def cache_salt(request: Request, body: SamplingFields) -> str | None:
    """Requests share cached prefixes only with requests of the same salt: the client's own, or its key.

    Hits can be timed, so clients with different keys must not find each other's prompts. With a single key, or none,
    there is no default.
    """
    if body.cache_salt is not None:
        return f"salt {body.cache_salt}"
    key_id: str | None = getattr(request.state, KEY_ID, None)
    return None if key_id is None else f"key {key_id}"


def _check(field: str, number: int, what: str, option: str, most: int) -> None:
    if number > most:
        raise ValueError(f"{field}: {number} {what} are too many; it must be at most {most} ({option})")


def choices_of(
    request_id: str,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    shown_ids: Set[int] = frozenset(),
    every_prompt_logprobs: bool = False,
    cache_salt: str | None = None,
) -> list[AddRequest]:
    """The engine's requests for `n` choices of each prompt: first all choices of the first prompt.

    Args:
        shown_ids, cache_salt: see `Engine.add_request`.
        every_prompt_logprobs: every choice returns the prompt's log-probabilities, not only the first.
    """
    commands: list[AddRequest] = []
    for prompt in prompts:
        for index in range(params.n):
            choice = params.choice(index)
            if every_prompt_logprobs:
                choice = replace(choice, prompt_logprobs=params.prompt_logprobs)
            name = f"{request_id}-{len(commands)}"
            commands.append(AddRequest(name, prompt, choice, frozenset(shown_ids), cache_salt))
    return commands
