"""What balancing buys while serving: one skewed traffic after another, with the balancer off, `eplb`, and `auto`.

Prompts are made of few token ids, so few experts are hot, and the placement to start with has the hot half of every
layer on the lower ranks: what an operator meets whose placement was made for other traffic. In the middle the traffic
changes to other token ids. All ways run in turns on the same prompts; prefill-heavy, so that a layer takes as long as
its busiest rank computes. Two ranks on two cores have a core each. With more ranks than cores the system shares the
cores among them, and only rows per rank tell of balance.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moe_runtime.balancer.placement import Placement
from moe_runtime.build import build_engine
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.sampling_params import SamplingParams

WAYS = ("off", "eplb", "auto")
PROMPT_TOKENS, OUTPUT_TOKENS, CONCURRENCY = 256, 4, 8
PARAMS = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


@dataclass(frozen=True)
class Sample:
    """One step: when it ended, its tokens, how long it took, and the balance of its rows over the ranks."""

    at: float
    tokens: int
    seconds: float
    imbalance: float
    version: int


class Traffic:
    """Prompts of a few token ids; the same for every way."""

    def __init__(self, vocab_size: int, hot_tokens: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._ids = [random.choice(np.arange(2, vocab_size), hot_tokens, replace=False) for _ in range(2)]
        self._random = random

    def prompts(self, phase: int) -> Iterator[list[int]]:
        while True:
            yield self._random.choice(self._ids[phase], PROMPT_TOKENS).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint directory, or demo")
    parser.add_argument("--ep-size", type=int, default=2)
    parser.add_argument("--redundant-experts", type=int, default=0)
    parser.add_argument("--hot-tokens", type=int, default=24, help="token ids that prompts are made of (default 24)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two kinds of traffic")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/balance"))
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        start = adverse_placement(options, Path(folder) / "placement.json")
        runs = {}
        for way in options.ways:
            print(f"{way} ...", flush=True)
            runs[way] = run(options, way, start)
    table = table_of(runs, options)
    print(table)
    (options.out / "balance.md").write_text(table)
    machine = {"cpus": os.cpu_count(), "ep_size": options.ep_size, "model": options.model, "seconds": options.seconds}
    samples = {way: [asdict(sample) for sample in found] for way, found in runs.items()}
    (options.out / "balance.json").write_text(json.dumps({"machine": machine, "samples": samples}) + "\n")
    plot(runs, options)


def make_engine(options: argparse.Namespace, way: str, placement: Path | None) -> Engine:
    config = EngineConfig(
        options.model,
        ep_size=options.ep_size,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=64,
        skip_tokenizer_init=True,
        balance=way,
        balance_interval=10,
        redundant_experts=options.redundant_experts,
        placement=None if placement is None else str(placement),
        device="cpu",
    )
    return build_engine(config)


def adverse_placement(options: argparse.Namespace, file: Path) -> Path:
    """Serve the first traffic for a moment, and put each layer's hottest experts together on the lower ranks."""
    engine = make_engine(options, "off", None)
    try:
        prompts = Traffic(engine.model_config.vocab_size, options.hot_tokens, seed=1).prompts(0)
        for number in range(CONCURRENCY):
            engine.add_request(str(number), next(prompts), PARAMS)
        while engine.has_work:
            engine.step()
        load_LE = engine.expert_load().total
        layers, shape = engine.model_config.moe_layers, engine.placement().slots.shape
    finally:
        engine.close()
    slots = np.full((shape[0], shape[1], -(-load_LE.shape[1] // shape[1])), -1)
    for slots_WS, load_E in zip(slots, load_LE, strict=True):
        for row, experts in zip(slots_WS, np.array_split(np.argsort(-load_E), shape[1]), strict=True):
            row[: len(experts)] = experts
    Placement(slots, load_LE.shape[1], layers).save(file)
    return file


def run(options: argparse.Namespace, way: str, placement: Path) -> list[Sample]:
    engine = make_engine(options, way, placement)
    try:
        traffic = Traffic(engine.model_config.vocab_size, options.hot_tokens, seed=1)
        samples: list[Sample] = []
        number = running = 0
        counts = engine.executor.expert_counts().sum(axis=(0, 1))
        begin = time.perf_counter()
        for phase in range(2):
            prompts = traffic.prompts(phase)
            while (now := time.perf_counter() - begin) < (phase + 1) * options.seconds or running:
                while running < CONCURRENCY and now < (phase + 1) * options.seconds:
                    engine.add_request(str(number), next(prompts), PARAMS)
                    number, running = number + 1, running + 1
                before = engine.stats()
                deltas = engine.step()
                running -= sum(delta.finish_reason is not None for delta in deltas)
                after = engine.stats()
                end = time.perf_counter() - begin
                tokens = after.prompt_tokens - before.prompt_tokens + after.generation_tokens - before.generation_tokens
                samples.append(Sample(end, tokens, end - now, 0.0, engine.placement().version))
                if len(samples) % 10 == 0:
                    new = engine.expert_load().total
                    rows_W = rank_rows(new - counts, engine.placement())
                    counts = new
                    imbalance = float(rows_W.max() / rows_W.mean()) if rows_W.any() else 1.0
                    samples[-1] = Sample(end, tokens, end - now, imbalance, engine.placement().version)
        for decision in engine.decisions():
            figures = {
                name: round(value, 3) if isinstance(value, float) else value
                for name, value in decision.items()
                if name not in ("outcome", "at", "moves_experts") and value is not None
            }
            print(f"  {figures}", flush=True)
        return samples
    finally:
        engine.close()


def rank_rows(load_LE: np.ndarray, placement: Placement) -> np.ndarray:
    """Rows that each rank's experts compute, replicas sharing as the router's tables have them."""
    from moe_runtime.balancer.split import split_tokens

    layers = zip(load_LE, placement.slots, strict=True)
    # A layer waits for its busiest rank, whichever that is: ranks are sorted by load within each layer.
    return np.sum([np.sort(load_E @ split_tokens(load_E, slots_WS)) for load_E, slots_WS in layers], axis=0)


def table_of(runs: dict[str, list[Sample]], options: argparse.Namespace) -> str:
    lines = [
        f"{options.model}, {options.ep_size} ranks, prompts of {PROMPT_TOKENS} tokens with {OUTPUT_TOKENS} new ones, "
        f"{os.cpu_count()} cores.",
        "",
        "| traffic | balance | tokens/s | in the last third | to off | max/mean rows, last third | p99 step, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for phase, name in enumerate(("first", "shifted")):
        base = 0.0
        for way, samples in runs.items():
            part = [s for s in samples if phase * options.seconds <= s.at < (phase + 1) * options.seconds]
            last = [s for s in part if s.at >= (phase + 2 / 3) * options.seconds]
            whole = sum(s.tokens for s in part) / options.seconds
            end = sum(s.tokens for s in last) / (options.seconds / 3)
            base = end if way == "off" else base
            ratio = f"{end / base:.2f}" if base else ""
            imbalance = statistics.median([s.imbalance for s in last if s.imbalance] or [float("nan")])
            p99 = np.percentile([s.seconds for s in part], 99) * 1e3
            lines.append(f"| {name} | {way} | {whole:.0f} | {end:.0f} | {ratio} | {imbalance:.2f} | {p99:.0f} |")
    return "\n".join(lines) + "\n"


def plot(runs: dict[str, list[Sample]], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for way, samples in runs.items():
        edges = np.arange(0, 2 * options.seconds + 1, max(2.0, options.seconds / 20))
        tokens, _ = np.histogram([s.at for s in samples], edges, weights=[s.tokens for s in samples])
        above.step(edges[1:], tokens / np.diff(edges), label=way)
        measured = [s for s in samples if s.imbalance]
        below.plot([s.at for s in measured], [s.imbalance for s in measured], label=way)
    above.set_ylabel("tokens/s")
    above.legend(title="balance")
    below.set_ylabel("max/mean rows over ranks")
    below.set_xlabel("seconds; the traffic changes in the middle")
    for axes in (above, below):
        axes.axvline(options.seconds, color="0.7", linestyle=":")
        axes.set_ylim(bottom=0)
    figure.savefig(options.out / "balance.png", dpi=120)


if __name__ == "__main__":
    main()
