"""transformers as a driver: `python -m peers.hf_engine MODEL DTYPE`. In float32 it is the reference for the check.

The loop does the same as `generate` for prompts of one length, without its overhead. transformers has several ways to
run experts; a trial per case finds the fastest for each phase, which is then measured.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from peers.protocol import Stopwatch, serve, take_stdout

Prompts = list[list[int]]
# "batched_mm" copies the weights of every (token, expert) pair: seconds per step for more than one token.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
MOST_BATCHED_MM_TOKENS = 1
TRIAL_ROUNDS, TRIAL_STEPS = 2, 3


class HFEngine:
    def __init__(self, path: str, dtype: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.model.eval()
        self.best: dict[tuple[int, int], tuple[str, str]] = {}

    def info(self) -> dict[str, Any]:
        best = {f"{batch} x {length}": names for (batch, length), names in self.best.items()}
        return {"version": transformers.__version__, "torch": torch.__version__, "experts_implementation": best}

    def trial(self, prompts: Prompts) -> dict[str, Any]:
        """Time every implementation on prompts like these, and keep the best for each phase."""
        tokens, cache, last = torch.tensor(prompts), None, None
        times: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}

        def note(phase: str, name: str, seconds: float) -> None:
            times[phase][name] = min(seconds, times[phase].get(name, seconds))

        for _ in range(TRIAL_ROUNDS):
            for name in _possible(tokens.numel()):
                start = time.perf_counter()
                cache, last = self._forward(name, tokens, None)
                note("prefill", name, time.perf_counter() - start)
            for name in _possible(len(prompts)):
                start = time.perf_counter()
                for _ in range(TRIAL_STEPS):
                    cache, last = self._forward(name, last, cache)
                note("decode", name, (time.perf_counter() - start) / TRIAL_STEPS)
        prefill, decode = (min(found, key=found.__getitem__) for found in times.values())
        self.best[tokens.shape[0], tokens.shape[1]] = prefill, decode
        return {"best": {"prefill": prefill, "decode": decode}, "seconds": times}

    def generate(self, prompts: Prompts, new_tokens: int) -> dict[str, float]:
        tokens = torch.tensor(prompts)
        prefill, decode = self.best[tokens.shape[0], tokens.shape[1]]
        everyone = range(len(prompts))
        watch = Stopwatch(len(prompts))
        cache, last = self._forward(prefill, tokens, None)
        watch.step(everyone)
        for _ in range(new_tokens - 1):
            cache, last = self._forward(decode, last, cache)
            watch.step(everyone)
        return watch.result()

    def logprobs(self, prompts: Prompts, top: int) -> list[Any]:
        """See `OursEngine.logprobs`."""
        found = []
        for prompt in prompts:
            logprobs_TV = self._prompt_logprobs(prompt)
            ids = torch.cat([torch.tensor(prompt[1:])[:, None], logprobs_TV.topk(top).indices], dim=1)
            values = logprobs_TV.gather(1, ids)
            found.append([list(pair) for pair in zip(ids.tolist(), values.tolist(), strict=True)])
        return found

    def all_logprobs(self, prompts: Prompts, path: str) -> str:
        """Write the log-probabilities of all tokens, `[prompts, positions - 1, V]` in float32, to a .npy file."""
        np.save(path, torch.stack([self._prompt_logprobs(prompt) for prompt in prompts]).numpy())
        return path

    def _prompt_logprobs(self, prompt: list[int]) -> torch.Tensor:
        self.model.set_experts_implementation("eager")
        return self.model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)

    def _forward(self, implementation: str, tokens: torch.Tensor, cache: Any) -> tuple[Any, torch.Tensor]:
        self.model.set_experts_implementation(implementation)
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)


def _possible(num_tokens: int) -> list[str]:
    return [name for name in IMPLEMENTATIONS if name != "batched_mm" or num_tokens <= MOST_BATCHED_MM_TOKENS]


def main() -> None:
    answers = take_stdout()
    path, dtype = sys.argv[1:]
    with torch.inference_mode():
        engine = HFEngine(path, dtype)
        serve(
            answers, {name: getattr(engine, name) for name in ("info", "trial", "generate", "logprobs", "all_logprobs")}
        )


if __name__ == "__main__":
    main()
