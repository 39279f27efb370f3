"""A request's way to the engine, which all protocols share: its limits, its prompts' tokens, its choices."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from fastapi import Request

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.engine_messages import AddRequest, Loaded
from moe_runtime.serve.keys import key_identity
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
        key, is_limited: of the client; see `Access`. What one key has sent is not remembered for another, because the
            time of an answer would tell.
    """

    engine: AsyncEngine
    info: Loaded
    config: ServerConfig
    tokenising: Tokenising
    key: str
    is_limited: bool

    @classmethod
    def of(cls, request: Request) -> Front:
        """Raises UnavailableError unless the engine accepts requests."""
        state, engine = request.app.state, engine_of(request)
        own = request.state
        return cls(engine, engine.require_ready(), state.server_config, state.tokenising, own.key, own.is_limited)

    def user(self, name: str | None) -> str:
        """Who takes a turn with a request when requests wait: its key, else the `user` that it names."""
        return self.key or ("" if name is None else key_identity(name.encode("utf-8", "surrogatepass")))

    def salt(self, asked: str | None) -> str | None:
        """Requests share cached prefixes only with requests of the same salt: what the client asks for, or its key.

        Hits can be timed, so clients with different keys must not find each other's prompts.
        """
        if asked is not None:
            return f"salt {asked}"
        return f"key {self.key}" if self.key else None

    async def check_form(self, params: SamplingParams) -> None:
        """Compile what an output must look like, in a thread. The engine then finds it compiled.

        Raises:
            ValueError: it cannot be done; the message says why.
        """
        asked, grammars = params.structured_outputs, self.info.grammars
        if grammars is not None and asked is not None:
            await self.tokenising.run(lambda gone: grammars.compile(asked))

    def check_limits(self, params: SamplingParams, num_prompts: int) -> None:
        """Check a request's size before more is done with it.

        Raises:
            ValueError: it asks for more than the server's options allow.
            QueueFullError: as many requests wait as may.
        """
        config = self.config
        if self.is_limited and params.priority < 0:
            raise ValueError(f"priority: {params.priority} is not allowed without an admin key; it must be at least 0")
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
        self.engine.check_queue()


def _check(field: str, number: int, what: str, option: str, most: int) -> None:
    if number > most:
        raise ValueError(f"{field}: {number} {what} are too many; it must be at most {most} ({option})")


def choices_of(
    request_id: str,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    user: str,
    shown_ids: Set[int] = frozenset(),
    every_prompt_logprobs: bool = False,
    cache_salt: str | None = None,
) -> list[AddRequest]:
    """The engine's requests for `n` choices of each prompt: first all choices of the first prompt.

    Args:
        user, shown_ids, cache_salt: see `Engine.add_request`.
        every_prompt_logprobs: every choice returns the prompt's log-probabilities, not only the first.
    """
    commands: list[AddRequest] = []
    for prompt in prompts:
        for index in range(params.n):
            choice = params.choice(index)
            if every_prompt_logprobs:
                choice = replace(choice, prompt_logprobs=params.prompt_logprobs)
            name = f"{request_id}-{len(commands)}"
            commands.append(AddRequest(name, prompt, choice, user, frozenset(shown_ids), cache_salt))
    return commands
