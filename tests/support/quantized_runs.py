"""Answers of engines with quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines import Pools, pool_engine, run
from tiny_models import VOCAB

from moe_runtime.types.sampling_params import SamplingParams

Answers = tuple[list[list[int]], list[float]]


def answers(
    pools: Pools, path: Path, ep_size: int = 1, is_quantized: bool = False, **options: Any
) -> tuple[list[list[int]], list[float]]:
    """Greedy tokens of prompts of mixed lengths, and the log-probabilities of each."""
    prompts = [[(7 * i + length) % VOCAB for i in range(length)] for length in (1, 3, 8, 21)]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=0)
    with pool_engine(pools, path, ep_size, **options) as engine:
        deltas = run(engine, prompts, params)
        shown = engine.health()["quantization"]
    assert (is_quantized or "quantization" in options) == (set(shown.values()) != {"none"})
    tokens = [[token for delta in one for token in delta.token_ids] for one in deltas]
    logprobs = [
        entry.logprob for one in deltas for delta in one for place in delta.logprobs or [] for entry in place.values()
    ]
    return tokens, logprobs
