"""Steps of the real engine, timed: for what a step takes beside its work, and to check predictions against."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.config import EngineConfig
from moe_runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.engine import Engine

WARM_STEPS = 3
PROBE_TOKENS = 60
PROBE: dict[str, Any] = {  # a qwen3_moe that is nearly all overhead
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class StepTimes:
    """Of one generation.

    Attributes:
        prefill: seconds from handing over all prompts until each has its first token.
        decode: median seconds between the ends of steps, the first few left out.
        prefill_busy, decode_busy: the processor time of all ranks in that; None where the rank is in this process.
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
        """One generation of all prompts at once, each with so many new tokens."""
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


def probe_steps(folder: Path, num_layers: int, ep_size: int, batches: Sequence[int], rounds: int) -> list[float]:
    """Seconds of a decode step of the probe model, for each number of sequences: medians of rounds."""
    from moe_runtime.build import build_engine

    (folder / "config.json").write_text(json.dumps(PROBE | {"num_hidden_layers": num_layers}))
    config = EngineConfig(
        model=str(folder),
        ep_size=ep_size,
        device="cpu",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=max(batches),
        max_model_len=256,
    )
    engine = build_engine(config)
    try:
        timer = StepTimer(engine)
        found = [
            [timer.run([[index + 1] * 8 for index in range(batch)], PROBE_TOKENS).decode for batch in batches]
            for _ in range(rounds + 1)
        ][1:]  # the first round warms up
        return [statistics.median(column) for column in zip(*found, strict=True)]
    finally:
        engine.close()


def _cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time of processes so far, all their threads, from the scheduler's own count in nanoseconds."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9
