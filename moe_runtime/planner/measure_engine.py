"""Times steps of the real engine, to fit a step's overheads and to check predictions."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.config.engine import EngineConfig
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.engine.engine import Engine

WARM_STEPS = 3
PROBE_DECODE_PROMPT = 8
PROBE_PAGES_BYTES = 128 << 20
PROBE: dict[str, Any] = {  # a qwen3_moe whose steps are nearly all overhead: it fits into the caches
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
# Changes that make ranks send many rows, evenly: every token uses every expert.
SENDING: dict[str, Any] = {"hidden_size": 512, "num_experts": 16, "num_experts_per_tok": 16}
# Attention takes longer than ranks without a sequence poll for the others before they sleep.
WAITING: dict[str, int] = {"num_attention_heads": 32, "num_key_value_heads": 8}


@dataclass(frozen=True)
class StepTimes:
    """Times of one generation.

    Attributes:
        prefill: seconds from submitting all prompts until each has its first token.
        decode: median seconds between the ends of steps, without the first few.
        prefill_busy, decode_busy: processor time of all ranks in the same; None if the rank is in this process.
    """

    prefill: float
    decode: float
    prefill_busy: float | None
    decode_busy: float | None


class StepTimer:
    """Generates with an engine step by step, and times the steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ids = map(str, itertools.count())

    def run(self, prompts: Sequence[list[int]], new_tokens: int) -> StepTimes:
        """Time one generation of all prompts together, each with `new_tokens` new tokens."""
        assert new_tokens > WARM_STEPS + 1
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        pids = [rank.pid for rank in self.engine.executor.ranks]
        apart = [pid for pid in pids if pid != os.getpid()]
        missing = set()
        busy = [_cpu_seconds(apart)]
        start = time.perf_counter()
        for prompt in prompts:
            request_id = next(self._ids)
            missing.add(request_id)
            self.engine.add_request(request_id, prompt, params)
        while missing:
            missing -= {delta.request_id for delta in self.engine.step()}
        ends, busy = [time.perf_counter()], [*busy, _cpu_seconds(apart)]
        while self.engine.has_work:
            self.engine.step()
            ends.append(time.perf_counter())
        busy.append(_cpu_seconds(apart))
        steps = [late - early for early, late in itertools.pairwise(ends)][WARM_STEPS:]
        return StepTimes(
            prefill=ends[0] - start,
            decode=statistics.median(steps),
            prefill_busy=busy[1] - busy[0] if apart else None,
            decode_busy=(busy[2] - busy[1]) / (len(ends) - 1) if apart else None,
        )


@dataclass(frozen=True)
class Variant:
    """A probe model: ranks, layers, and what else differs from `PROBE`."""

    ep_size: int
    num_layers: int
    changes: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        return {**PROBE, "num_hidden_layers": self.num_layers, **self.changes}


def streaming(ep_size: int, num_layers: int, layer_bytes: int, **changes: int) -> Variant:
    """A probe model with about `layer_bytes` of experts per layer, in bfloat16; every token uses every expert."""
    hidden, experts = 512, 4
    inner = layer_bytes // (experts * 3 * hidden * 2) // 64 * 64
    sizes = {"hidden_size": hidden, "num_experts": experts, "num_experts_per_tok": experts}
    return Variant(ep_size, num_layers, sizes | {"moe_intermediate_size": inner} | changes)


def probe_steps(
    folder: Path,
    variants: Sequence[Variant],
    cases: Sequence[tuple[int, int]],
    new_tokens: int,
    rounds: int,
    between: Callable[[], float],
) -> list[list[list[tuple[StepTimes, float]]]]:
    """Step times of each probe model, for each case (number of sequences, length of prompts), in each round.

    All models run in each round, so that a change of the machine's pace affects all of them.

    Args:
        folder: gets a folder for each model.
        new_tokens: new tokens of a sequence in a run.
        between: called before and after each run; the mean of the two values is returned with the times.
    """
    from moe_runtime.build import build_engine

    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        timers = []
        for number, variant in enumerate(variants):
            path = folder / f"{number}"
            path.mkdir(exist_ok=True)
            (path / "config.json").write_text(json.dumps(variant.config()))
            config = EngineConfig(
                model=str(path),
                ep_size=variant.ep_size,
                device="cpu",
                load_format="dummy",
                skip_tokenizer_init=True,
                max_num_seqs=max(count for count, _ in cases),
                max_model_len=1024,
                max_num_batched_tokens=4096,
                decode_slowdown=math.inf,  # a case's prompts run in one step
                kv_cache_memory_bytes=PROBE_PAGES_BYTES,
                enable_prefix_caching=False,  # the same prompts run again
            )
            engine = build_engine(config)
            stack.callback(engine.close)
            timers.append(StepTimer(engine))
        found: list[list[list[tuple[StepTimes, float]]]] = [[[] for _ in cases] for _ in variants]
        before = between()
        for number in range(rounds + 1):
            for timer, of_timer in zip(timers, found, strict=True):
                for case, of_case in zip(cases, of_timer, strict=True):
                    times = timer.run(rng.integers(1, PROBE["vocab_size"], case).tolist(), new_tokens)
                    after = between()
                    if number:  # the first round warms up
                        of_case.append((times, (before + after) / 2))
                    before = after
    return found


def _cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time of processes so far, of all their threads, from the scheduler's count in nanoseconds."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9
