"""The options of `moe-runtime bench`, and the notation for length distributions. No torch."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.config.checks import check_integer, check_output

LENGTHS = '"128", "64-256" (uniform), "lognormal:MEDIAN:SIGMA" or "lognormal:MEDIAN:SIGMA:LOW-HIGH"'


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens.

    Attributes:
        low, high: minimum and maximum, both included.
        median, sigma: parameters of a lognormal distribution; sigma is the standard deviation of the logarithm. Draws
            are rounded and limited to `low` and `high`. None means uniform.
    """

    low: int
    high: int
    median: float | None = None
    sigma: float = 0.0

    @classmethod
    def parse(cls, name: str, text: object) -> Lengths:
        """Read `128`, `64-256`, `lognormal:200:0.8` or `lognormal:200:0.8:16-1000`; `name` is the option's name.

        Raises:
            ValueError: `text` is none of these, or a bound is wrong.
        """
        number = r"(\d+(?:\.\d+)?)"
        text = str(text)
        if found := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
            lengths = cls(int(found[1]), int(found[2] or found[1]))
        elif found := re.fullmatch(rf"lognormal:{number}:{number}(?::(\d+)-(\d+))?", text):
            low, high = int(found[3] or 1), int(found[4] or 2**31)
            lengths = cls(low, high, float(found[1]), float(found[2]))
        else:
            raise ValueError(f"{name}: {text!r} is not allowed; it must be {LENGTHS}")
        if not 1 <= lengths.low <= lengths.high or lengths.median == 0:
            raise ValueError(f"{name}: {text!r} is not allowed; lengths must be at least 1, and LOW at most HIGH")
        return lengths

    def draw(self, random_numbers: random.Random) -> int:
        if self.median is None:
            return random_numbers.randint(self.low, self.high)
        value = random_numbers.lognormvariate(math.log(self.median), self.sigma)
        return round(min(max(value, self.low), self.high))


@dataclass(frozen=True)
class BenchOptions:
    """Options of the `bench` command. Lengths, prompts and arrivals use the engine's `seed`.

    Attributes:
        url: a running server of this runtime, such as http://127.0.0.1:8000, to measure instead of an engine here.
        api_key_file: file whose first key is sent to the server at url.
        request_rate: requests that arrive per second (Poisson), or inf for all at once. Several rates are measured one
            after the other.
        num_prompts: requests at each rate.
        max_concurrency: maximum requests in progress at once; others wait, and their time starts when they are sent.
        input_len: tokens of a prompt: 128, 64-256 (uniform), or lognormal:MEDIAN:SIGMA[:LOW-HIGH].
        output_len: tokens to generate, in the same form.
        text: a text file from which prompts are cut; without one, prompts are random token ids.
        num_warmups: requests before the first rate that do not count.
        seed: seeds lengths, prompts and arrivals, and the engine.
        request_timeout: seconds after which an unfinished request counts as failed.
        output: file for results, .json or .png; may be repeated.

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    url: str | None = None
    api_key_file: str | None = None
    request_rate: Sequence[float] = (math.inf,)
    num_prompts: int = 100
    max_concurrency: int | None = None
    input_len: str = "128"
    output_len: str = "64"
    text: str | None = None
    num_warmups: int = 2
    seed: int = 0
    request_timeout: float = 600.0
    output: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.url is not None and not re.match(r"https?://[^/]", str(self.url)):
            raise ValueError(f"url: {self.url!r} is not allowed; it must start with http:// or https://")
        rates: Sequence[Any] = (
            self.request_rate if isinstance(self.request_rate, (list, tuple)) else [self.request_rate]
        )
        if not rates or not all(isinstance(rate, (int, float)) and rate > 0 for rate in rates):
            raise ValueError(f"request_rate: {rates!r} is not allowed; each must be a number above 0, or inf")
        object.__setattr__(self, "request_rate", tuple(map(float, rates)))
        check_integer("num_prompts", self.num_prompts, 1)
        check_integer("num_warmups", self.num_warmups, 0)
        check_integer("seed", self.seed, 0)
        if self.max_concurrency is not None:
            check_integer("max_concurrency", self.max_concurrency, 1)
        if not isinstance(self.request_timeout, (int, float)) or not self.request_timeout > 0:
            raise ValueError(f"request_timeout: {self.request_timeout!r} is not allowed; it must be a number above 0")
        Lengths.parse("input_len", self.input_len)
        Lengths.parse("output_len", self.output_len)
        outputs = (self.output,) if isinstance(self.output, str) else tuple(self.output)
        object.__setattr__(self, "output", outputs)
        for path in outputs:
            check_output("output", path, (".json", ".png"))
