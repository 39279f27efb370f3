"""Compares the peak memory of all ranks, from their start to their last token, with what they must hold.

    python scripts/check_memory.py MODEL --ep-size 1 2 4

They must hold their weights, in the layout of the kernels, and the requested KV cache; empty slots do not count. Memory
is the proportional set size (PSS), so that memory pages shared by ranks count once. This process, the front, counts
only with one rank, because then it is the rank. The prompts fill the KV cache to its last page.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
from pathlib import Path

from moe_runtime import LLM, SamplingParams
from moe_runtime.memory.budget import has_native_weights
from moe_runtime.memory.model_size import expert_bytes

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from served.processes import descendants, pss

ALLOWED = 1.1
PERIOD = 0.05  # seconds between two samples
PROMPT_TOKENS, OUTPUT_TOKENS = 1008, 16


class Watch:
    """The highest total PSS so far of this process's descendants, optionally including itself."""

    def __init__(self, includes_self: bool) -> None:
        self.peak = 0
        self._includes_self = includes_self
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(PERIOD):
            pids = descendants(os.getpid())
            self.peak = max(self.peak, sum(map(pss, [*pids, os.getpid()] if self._includes_self else pids)))


def measure(model: str, ep_size: int, sequences: int, max_tokens: int) -> tuple[int, int, int]:
    """Bytes of all ranks: peak, weights, KV cache."""
    watch = Watch(includes_self=ep_size == 1)
    length = PROMPT_TOKENS + OUTPUT_TOKENS
    with LLM(
        model,
        ep_size=ep_size,
        skip_tokenizer_init=True,
        max_num_seqs=sequences,
        max_model_len=length,
        max_num_batched_tokens=max_tokens,
    ) as llm:
        ranks = llm._engine.executor.ranks
        prompts = [
            {"prompt_token_ids": [random.randrange(1000) for _ in range(PROMPT_TOKENS)]}
            for _ in range(sequences * ep_size)
        ]
        params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        llm.generate(prompts, params, use_tqdm=False)
        num_empty = int((llm.placement().slots < 0).sum())
        native = has_native_weights(llm._engine.config.device)
        empty = num_empty * expert_bytes(llm._engine.model_config, ranks[0].dtype, native)
    watch.end()
    return watch.peak, sum(rank.weight_bytes for rank in ranks) - empty, sum(rank.kv_cache_bytes for rank in ranks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument("--ep-size", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="of a rank in a step")
    parser.add_argument("--sequences", type=int, default=4, help="of 1,024 tokens on each rank")
    options = parser.parse_args()
    print("| ranks | weights, GB | KV cache, GB | peak, GB | ratio |\n|---|---|---|---|---|")
    too_much = False
    for ep_size in options.ep_size:
        peak, weights, cache = measure(options.model, ep_size, options.sequences, options.max_num_batched_tokens)
        ratio = peak / (weights + cache)
        too_much |= ratio > ALLOWED
        print(f"| {ep_size} | {weights / 1e9:.2f} | {cache / 1e9:.2f} | {peak / 1e9:.2f} | {ratio:.3f} |", flush=True)
    return int(too_much)


if __name__ == "__main__":
    raise SystemExit(main())
