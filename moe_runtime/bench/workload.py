"""The requests of a measurement, as a function of its options and seed: lengths, prompts, arrivals. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.bench.options import BenchOptions, Lengths

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """One request: its arrival in seconds after the start, its prompt, and the tokens to generate."""

    arrival: float
    prompt: list[int]
    output_len: int


def make_workload(options: BenchOptions, index: int, tokens: Sequence[int]) -> list[Job]:
    """The requests of the rate `options.request_rate[index]`, in order of arrival.

    Lengths are the same at every rate. The gaps between arrivals are exponential (Poisson), and differ only in scale.
    Prompts differ, so that no rate benefits from a cache filled at another rate.

    Args:
        tokens: the tokens from which prompts are cut. If it is a `range`, a vocabulary, prompts are random draws.
    """
    rate = options.request_rate[index]
    draws = random.Random(options.seed)
    contents = random.Random(f"{options.seed} {index}")
    input_len, output_len = Lengths.parse("", options.input_len), Lengths.parse("", options.output_len)
    arrival, jobs = 0.0, []
    for _ in range(options.num_prompts):
        size = input_len.draw(draws)
        prompt = _prompt(tokens, size, contents)
        jobs.append(Job(arrival, prompt, output_len.draw(draws)))
        arrival += draws.expovariate(1.0) / rate
    return jobs


def make_warmups(options: BenchOptions, tokens: Sequence[int]) -> list[Job]:
    """Requests like those of the first rate, but all at once and with different prompts."""
    contents = random.Random(f"{options.seed} warm-up")
    jobs = make_workload(options, 0, tokens)[: options.num_warmups]
    return [Job(0.0, _prompt(tokens, len(job.prompt), contents), job.output_len) for job in jobs]


def _prompt(tokens: Sequence[int], size: int, contents: random.Random) -> list[int]:
    if isinstance(tokens, range):
        return contents.choices(tokens, k=size)
    start = contents.randrange(len(tokens) - size + 1)
    return list(tokens[start : start + size])


def check_lengths(jobs: Sequence[Job], max_model_len: int) -> None:
    """Raise ValueError if a request is longer than the model's context."""
    longest = max(jobs, key=lambda job: len(job.prompt) + job.output_len)
    if len(longest.prompt) + longest.output_len > max_model_len:
        raise ValueError(
            f"input_len, output_len: a request has {len(longest.prompt)} prompt tokens and {longest.output_len} output "
            f"tokens, but max_model_len is {max_model_len}; choose shorter lengths or bounds"
        )


def read_text(path: str, tokenizer: Tokenizer | None, options: BenchOptions) -> list[int]:
    """The tokens of a text file.

    Raises:
        ValueError: no tokenizer, or fewer tokens than the longest prompt drawn.
        OSError: the file cannot be read.
    """
    if tokenizer is None:
        raise ValueError("text: not allowed without a tokenizer")
    try:
        tokens = tokenizer.encode(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path!r} is not UTF-8 ({error})") from error
    longest = max(len(job.prompt) for job in make_workload(options, 0, range(1)))
    if len(tokens) < longest:
        raise ValueError(f"text: {path!r} has {len(tokens)} tokens, but the longest prompt needs {longest}")
    return tokens


def rate_name(rate: float) -> str:
    return "inf" if math.isinf(rate) else f"{rate:g}"
