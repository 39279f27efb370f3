"""Measures what the prefix cache gains with a shared prefix, and what it costs without one.

Time to first token: requests with a prefix of 2,000 tokens and 32 own ones arrive one by one, at an engine with the
cache, which has the prefix, and at one without. Throughput: a batch of requests that share nothing, with pages for two
such batches, so that the cache forgets pages all the time. The two engines measure in turn, in changing order, so that
other work on the machine affects both; each figure is the median of the rounds.

    python scripts/bench_prefix_cache.py          # writes table, samples and plot to benchmarks/prefix; minutes
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from moe_runtime.bench.report import describe_machine
from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.engine import Engine
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.types.version import __version__

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from make_bench_model import SHAPES, ensure_bench_model

OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "prefix"
PREFIX_TOKENS, OWN_TOKENS = 2000, 32
BATCH, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 128, 48
PAGE_TOKENS = 16
WAYS = {"on": True, "off": False}
Samples = dict[str, list[float]]  # by way


def make_engine(path: Path, ep_size: int, enabled: bool, bytes_per_token: int) -> Engine:
    """An engine with pages for a prefix and two batches."""
    num_tokens = PREFIX_TOKENS + 2 * BATCH * (PROMPT_TOKENS + OUTPUT_TOKENS)
    return build_engine(
        EngineConfig(
            str(path),
            ep_size=ep_size,
            dtype="bfloat16",
            device="cpu",
            skip_tokenizer_init=True,
            max_model_len=PREFIX_TOKENS + OWN_TOKENS + PAGE_TOKENS,
            max_num_seqs=BATCH,
            block_size=PAGE_TOKENS,
            kv_cache_memory_bytes=num_tokens * bytes_per_token,
            enable_prefix_caching=enabled,
        )
    )


def tokens(rng: random.Random, engine: Engine, count: int) -> list[int]:
    return rng.choices(range(engine.model_config.vocab_size), k=count)


def run(engine: Engine, prompts: list[list[int]], num_output: int) -> tuple[float, int]:
    """Seconds until all requests have ended, and the prompts' tokens that were cached."""
    params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    num_cached = 0
    while engine.has_work:
        num_cached += sum(delta.num_cached_tokens for delta in engine.step() if delta.finish_reason)
    return time.perf_counter() - start, num_cached


def measure(engines: dict[str, Engine], rounds: int, seed: int) -> tuple[Samples, Samples]:
    """Seconds to the first token, and generated tokens per second."""
    rng = random.Random(seed)
    first: Samples = {way: [] for way in engines}
    rates: Samples = {way: [] for way in engines}
    for number in range(-1, rounds):  # the first round warms up
        order = list(engines) if number % 2 else list(reversed(engines))
        any_engine = engines[order[0]]
        prefix, first_own, own = (tokens(rng, any_engine, n) for n in (PREFIX_TOKENS, OWN_TOKENS, OWN_TOKENS))
        for way in order:
            run(engines[way], [prefix + first_own], 1)
        for way in order:
            seconds, num_cached = run(engines[way], [prefix + own], 1)
            assert num_cached == (PREFIX_TOKENS // PAGE_TOKENS * PAGE_TOKENS if WAYS[way] else 0), num_cached
            if number >= 0:
                first[way].append(seconds)
        prompts = [tokens(rng, any_engine, PROMPT_TOKENS) for _ in range(BATCH)]
        for way in order:
            seconds, num_cached = run(engines[way], prompts, OUTPUT_TOKENS)
            assert num_cached == 0
            if number >= 0:
                rates[way].append(BATCH * OUTPUT_TOKENS / seconds)
    return first, rates


def table(first: Samples, rates: Samples) -> str:
    """The medians, and the median and the quartiles of the ratios of the rounds."""
    rows = ["| | cache on | cache off | ratio | quartiles |", "|---|---|---|---|---|"]
    cases = {
        f"time to first token, ms, {PREFIX_TOKENS} of {PREFIX_TOKENS + OWN_TOKENS} tokens shared": (first, 1e3, "off"),
        f"tokens/s, {BATCH} requests that share nothing": (rates, 1.0, "on"),
    }
    for name, (samples, factor, above) in cases.items():
        below = "on" if above == "off" else "off"
        ratios = [a / b for a, b in zip(samples[above], samples[below], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        on, off = (statistics.median(samples[way]) * factor for way in WAYS)
        rows.append(f"| {name} | {on:.1f} | {off:.1f} | {middle:.3f} {above}/{below} | {low:.3f} to {high:.3f} |")
    return "\n".join(rows) + "\n"


def draw(path: Path, first: Samples, rates: Samples) -> None:
    """Every sample, and the medians."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = (
        (first, 1e3, f"time to first token, ms\n{PREFIX_TOKENS} of {PREFIX_TOKENS + OWN_TOKENS} tokens shared"),
        (rates, 1.0, f"tokens/s\n{BATCH} requests that share nothing"),
    )
    for axes, (samples, factor, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for place, way in enumerate(WAYS):
            values = [value * factor for value in samples[way]]
            axes.bar(place, statistics.median(values), width=0.6, color=("#2b6cb0", "#a0aec0")[place])
            axes.plot([place] * len(values), values, "k.", markersize=4)
        axes.set_xticks(range(len(WAYS)), [f"cache {way}" for way in WAYS])
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[shape for shape in SHAPES if shape != "olmoe"], default="bench")
    parser.add_argument("--ep-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    from moe_runtime.memory.model_size import kv_bytes_per_token
    from moe_runtime.models.registry import read_model_config

    path = ensure_bench_model(options.shape)
    bytes_per_token = kv_bytes_per_token(read_model_config(path), "bfloat16")
    engines = {way: make_engine(path, options.ep_size, on, bytes_per_token) for way, on in WAYS.items()}
    first, rates = measure(engines, options.rounds, options.seed)
    stats = {way: engine.stats().prefix_cache for way, engine in engines.items()}
    assert stats["on"].evictions > 0 and stats["off"].queries == 0, stats
    for engine in engines.values():
        engine.close()
    found = table(first, rates)
    print(found)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "prefix.md").write_text(found)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "version": __version__,
        "shape": options.shape,
        "ep_size": options.ep_size,
        "seconds_to_first_token": first,
        "tokens_per_second": rates,
        "evictions": stats["on"].evictions,
    }
    (options.out / "prefix.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(options.out / "prefix.png", first, rates)


if __name__ == "__main__":
    main()
