"""The messages between HTTP and the engine's thread. They exchange nothing else.

Commands go to the engine, events come back. Both are plain values, so that the engine can move to another process.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.request_rules import RequestRules
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.engine.stats import EngineStats
    from moe_runtime.grammars.compile import GrammarCompiler
    from moe_runtime.text.tokenizer import Tokenizer
    from moe_runtime.types.outputs import OutputDelta


View = Literal["expert_load", "placement", "decisions"]


@dataclass(frozen=True)
class AddRequest:
    """Continue a prompt. The replies are `Accepted` or `Refused`, then the deltas of `Stepped`.

    `user` is who takes a turn with it when requests wait. `shown_ids` are special tokens that stay in the text in spite
    of `skip_special_tokens`. Requests share cached prefixes only with requests of the same `cache_salt`.
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    user: str = ""
    shown_ids: frozenset[int] = frozenset()
    cache_salt: str | None = None
    arrived_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class AbortRequest:
    """Remove a request and free its pages. There is no reply; an unknown id is allowed."""

    request_id: str


@dataclass(frozen=True)
class Query:
    """Ask the engine for one of its views. The reply is an `Answer` with the same id."""

    query_id: int
    what: View


@dataclass(frozen=True)
class StartRebalance:
    """Plan a better placement and move experts there. The `Answer` comes once they have moved, or has a ValueError."""

    query_id: int
    dry_run: bool


@dataclass(frozen=True)
class ResetPrefixCache:
    """Forget all cached prefixes. The reply is an `Answer` with the same id."""

    query_id: int


@dataclass(frozen=True)
class Close:
    """End the engine and its ranks, even with running requests. This is the last command; there is no reply."""


Command = AddRequest | AbortRequest | Query | StartRebalance | ResetPrefixCache | Close


@dataclass(frozen=True)
class Loaded:
    """The model is loaded, and the engine accepts requests.

    Attributes:
        config: the engine's options.
        rules: what every request must obey.
        tokenizer: None if the server takes and returns token ids only.
        default_sampling: the model's own values for fields of `SamplingParams` that a request leaves out.
        family: the model's family, a config's `model_type`.
        health: the engine's choices and guarantees.
        stats: its first figures.
        grammars: checks what outputs must look like; None without a tokenizer.
    """

    config: EngineConfig
    rules: RequestRules
    tokenizer: Tokenizer | None
    default_sampling: dict[str, Any]
    family: str
    health: dict[str, object]
    stats: EngineStats
    grammars: GrammarCompiler | None = None

    @property
    def max_model_len(self) -> int:
        """Maximum length of prompt plus output."""
        return self.rules.max_model_len

    @property
    def model_name(self) -> str:
        """The name that clients see."""
        return self.config.served_model_name or self.config.model


@dataclass(frozen=True)
class LoadFailed:
    """The engine could not be made. `user_mistake`: the user asked for something that cannot be served."""

    message: str
    user_mistake: bool


@dataclass(frozen=True)
class Accepted:
    request_id: str


@dataclass(frozen=True)
class Refused:
    """The request cannot be served; the message names the field, the value and what is allowed."""

    request_id: str
    message: str


@dataclass(frozen=True)
class Stepped:
    """A step's deltas, and the engine's figures after the step."""

    deltas: list[OutputDelta]
    stats: EngineStats


@dataclass(frozen=True)
class Answer:
    query_id: int
    value: Any


@dataclass(frozen=True)
class Died:
    """The engine failed and runs no more steps. The message names the rank if a rank caused it."""

    message: str


Event = Loaded | LoadFailed | Accepted | Refused | Stepped | Answer | Died
