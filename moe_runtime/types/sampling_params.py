"""Sampling parameters of a request. Names and defaults are those of vLLM and OpenAI."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_runtime.types.expert_policy import ExpertPolicy, parse_expert_policy
from moe_runtime.types.structured_outputs import StructuredOutputs

MAX_LOGPROBS = 20  # OpenAI's limit on `top_logprobs`
MAX_LOGIT_BIAS = 100.0  # OpenAI's limit
LEAST_TEMPERATURE = 1e-5  # a lower one is greedy: float32 cannot hold logits divided by it
MAX_INTEGER = 2**63 - 1  # the largest integer in a message between processes


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    Attributes:
        n: how many independent continuations to return, at least 1. The first uses `seed`, the i-th `seed + i`.
        max_tokens: maximum number of tokens to generate; `None` means up to the end of the context. With 0 the prompt
            only runs, for its log-probabilities.
        min_tokens: the output cannot end before this many tokens, at most `max_tokens`.
        temperature: 0 is greedy, and so is anything below 1e-5; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose total probability reaches this, in (0, 1].
        top_k: keep this many of the best tokens; 0 or -1 keeps all.
        min_p: drop tokens below this share of the best token's probability, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen so far, above 0.
        presence_penalty, frequency_penalty: subtracted once / per occurrence in the output, in [-2, 2].
        logit_bias: token id -> what is added to its logit, in [-100, 100].
        seed: the same seed gives the same tokens, whatever else runs; `None` or -1 draws a seed.
        stop: strings that end the output; the output is cut before them.
        stop_token_ids: ids that end the output, in addition to the model's own end-of-sequence ids.
        ignore_eos: continue past the model's end-of-sequence ids.
        logprobs: return the log-probability of every output token and of this many best tokens (0 to 20).
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string in the output.
        routing: experts per token: "full", "balanced", "fast", or a policy such as "top_k=4", "top_p=0.8" or
            "threshold=0.5"; None uses the server's default.
        return_routed_experts: with the last token, return the experts that each token used in every sparse layer.
        priority: while requests wait, those with a lower one go first (any integer).
        timeout: seconds after which the request ends, whether it waits or runs; its finish reason is then "timeout".
        structured_outputs: the form of the output; None for any. A mapping with the fields of it is taken too.

    Log-probabilities are those of the model, before penalties, temperature and truncation.

    Raises:
        ValueError: a value is out of range; the message names the field, the value and what is allowed.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    routing: str | ExpertPolicy | None = None
    return_routed_experts: bool = False
    priority: int = 0
    timeout: float | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop, "strings")
        stop_token_ids = _items("stop_token_ids", self.stop_token_ids, "integers")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        for name, low, high, open_low in (
            ("temperature", 0.0, None, False),
            ("top_p", 0.0, 1.0, True),
            ("min_p", 0.0, 1.0, False),
            ("repetition_penalty", 0.0, None, True),
            ("presence_penalty", -2.0, 2.0, False),
            ("frequency_penalty", -2.0, 2.0, False),
        ):
            object.__setattr__(self, name, _number(name, getattr(self, name), low, high, open_low))
        if self.seed == -1 and not isinstance(self.seed, bool):
            object.__setattr__(self, "seed", None)
        if self.timeout is not None:
            object.__setattr__(self, "timeout", _number("timeout", self.timeout, 0.0, None, True))
        _check_integer("n", self.n, 1)
        _check_integer("priority", self.priority, -MAX_INTEGER)
        _check_integer("top_k", self.top_k, -1)
        for name, low, high in (
            ("max_tokens", 0, MAX_INTEGER),
            ("seed", 0, MAX_INTEGER),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), low, high)
        _check_integer("min_tokens", self.min_tokens, 0, MAX_INTEGER if self.max_tokens is None else self.max_tokens)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "routing", parse_expert_policy(self.routing))
        object.__setattr__(self, "structured_outputs", StructuredOutputs.of(self.structured_outputs))
        if self.structured_outputs is not None and self.ignore_eos:
            raise ValueError("ignore_eos: true is not allowed with structured_outputs, which say where an output ends")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "return_routed_experts"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; it must be true or false")
        for text in stop:
            if not isinstance(text, str) or not text or not is_unicode(text):
                raise ValueError(f"stop: {text!r} is not allowed; every stop string must be a non-empty Unicode string")
        for token in stop_token_ids:
            _check_integer("stop_token_ids", token, 0)

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    def choice(self, index: int) -> SamplingParams:
        """The parameters of the `index`-th of the `n` continuations. Only the first returns `prompt_logprobs`."""
        if self.n == 1:
            return self
        seed = None if self.seed is None else (self.seed + index) % (MAX_INTEGER + 1)
        return replace(self, n=1, seed=seed, prompt_logprobs=self.prompt_logprobs if index == 0 else None)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text. It cannot encode a lone surrogate, which JSON's escapes can contain."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _items(name: str, value: object, what: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: {value!r} is not allowed; it must be a list of {what}")
    return tuple(value)


def _number(name: str, value: object, low: float, high: float | None, open_low: bool) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        most = sys.float_info.max if high is None else high
        if (low < value if open_low else low <= value) and value <= most:
            return float(value)
    if high is None:
        allowed = f"above {low:g}" if open_low else f"at least {low:g}"
    else:
        allowed = f"above {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
    raise ValueError(f"{name}: {value!r} is not allowed; it must be a number {allowed}")


def _bias(value: object) -> dict[int, float] | None:
    if not value:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias: {value!r} is not allowed; it must be an object from token ids to numbers")
    for token in value:
        _check_integer("logit_bias", token, 0)
    return {token: _number("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, False) for token, bias in value.items()}


def _check_integer(name: str, value: object, low: int, high: int = MAX_INTEGER) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not allowed; it must be an integer from {low} to {high}")
