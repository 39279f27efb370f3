"""moe_runtime as a driver: `python -m peers.ours_engine MODEL EP_SIZE LOAD_FORMAT MAX_NUM_SEQS MAX_MODEL_LEN`, and
`--quantization` and `--activation-quantization` as the engine has them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_runtime import SamplingParams
from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.types.outputs import OutputDelta
from moe_runtime.types.version import __version__
from peers.protocol import Stopwatch, serve, take_stdout

Prompts = list[list[int]]
MAX_NUM_BATCHED_TOKENS = 4096


class OursEngine:
    """The engine that `LLM` wraps, stepped by hand so that a step's end can be timed."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = build_engine(config)
        self._ids = map(str, itertools.count())

    def info(self) -> dict[str, Any]:
        health = self.engine.health()
        chosen = ("kernels", "dispatcher", "dispatcher_steps", "placement_invariance")
        found = {"version": __version__, "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS} | {
            name: health[name] for name in chosen
        }
        return found | {"pids": [rank.pid for rank in self.engine.executor.ranks]}

    def generate(self, prompts: Prompts, new_tokens: int) -> dict[str, float]:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        watch = Stopwatch(len(prompts))
        for deltas in self._steps(prompts, params):
            watch.step(number for number, _ in deltas)
        return watch.result()

    def routing(self, prompts: Prompts, new_tokens: int) -> dict[str, Any]:
        """Experts that each step touches, by the gate's own choices for each token.

        All sequences decode in the same steps, because their prompts fit into one step; longer ones only prefill.

        Returns:
            For one rank, and for two that have half of the experts each: `total`, distinct experts summed over layers,
            and `largest`, the same for the rank with most experts in each layer. "decode": mean over steps (absent
            without decode steps). "prefill": as if all prompts were in one step. "rows": as "prefill", for rows instead
            of experts.
        """
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, return_routed_experts=True)
        found = {}
        for deltas in self._steps(prompts, params):
            found |= {number: d.routed_experts for number, d in deltas if d.routed_experts is not None}
        chosen_BTLK = np.stack([found[number] for number in range(len(prompts))])
        num_experts = self.engine.expert_load().tokens["prefill"].shape[1]
        length = len(prompts[0])
        prefill_SLE = _counts(chosen_BTLK[:, :length], num_experts).sum(axis=0, keepdims=True)
        counted = {"prefill": prefill_SLE > 0, "rows": prefill_SLE}
        if new_tokens > 1:
            counted["decode"] = _counts(chosen_BTLK[:, length:], num_experts) > 0
        return {
            str(ranks): {name: _by_rank(counts_SLE, ranks) for name, counts_SLE in counted.items()} for ranks in (1, 2)
        }

    def logprobs(self, prompts: Prompts, top: int) -> list[Any]:
        """Per prompt and position from 1 on: ids and log-probabilities of the prompt's token and the `top` best."""
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=top)
        found: dict[str, Any] = {}
        for prompt in prompts:
            self.engine.add_request(next(self._ids), prompt, params)
        while len(found) < len(prompts):
            for delta in self.engine.step():
                found[delta.request_id] = delta.prompt_logprobs
        ordered = [found[request_id] for request_id in sorted(found, key=int)]
        return [
            [[list(position), [entry.logprob for entry in position.values()]] for position in prompt[1:]]
            for prompt in ordered
        ]

    def _steps(self, prompts: Prompts, params: SamplingParams) -> Iterator[list[tuple[int, OutputDelta]]]:
        """The prompts' numbers and their new tokens, step by step."""
        number = {}
        for index, prompt in enumerate(prompts):
            request_id = next(self._ids)
            number[request_id] = index
            self.engine.add_request(request_id, prompt, params)
        running = len(prompts)
        while running:
            deltas = self.engine.step()
            yield [(number[delta.request_id], delta) for delta in deltas]
            running -= sum(delta.finish_reason is not None for delta in deltas)


def _counts(chosen_BSLK: np.ndarray, num_experts: int) -> np.ndarray:
    """Rows per step, layer and expert `[S, L, E]`, from the choices of all sequences."""
    return (chosen_BSLK[..., None] == np.arange(num_experts)).sum(axis=(0, 3))


def _by_rank(counts_SLE: np.ndarray, ranks: int) -> dict[str, float]:
    """Sum over layers, mean over steps: for all experts, and for the rank with the most in each layer."""
    parts = np.array_split(counts_SLE, ranks, axis=2)
    per_rank_SLW = np.stack([part.sum(axis=2) for part in parts], axis=2)
    total, largest = (x.sum(axis=1).mean() for x in (per_rank_SLW.sum(axis=2), per_rank_SLW.max(axis=2)))
    return {"total": float(total), "largest": float(largest)}


def config_of(arguments: list[str]) -> EngineConfig:
    """The engine's configuration, from this module's arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("ep_size", type=int)
    parser.add_argument("load_format")
    parser.add_argument("max_num_seqs", type=int)
    parser.add_argument("max_model_len", type=int)
    parser.add_argument("--quantization")
    parser.add_argument("--activation-quantization")
    fixed: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "skip_tokenizer_init": True}
    options = vars(parser.parse_args(arguments))
    return EngineConfig(max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS, enable_prefix_caching=False, **options, **fixed)


def main() -> None:
    answers = take_stdout()
    engine = OursEngine(config_of(sys.argv[1:]))
    try:
        names = ("info", "generate", "routing", "logprobs")
        serve(answers, {name: getattr(engine, name) for name in names})
    finally:
        engine.engine.close()


if __name__ == "__main__":
    main()
