"""What balancing buys while serving: one skewed traffic after another, with the balancer off, `eplb`, and `auto`.

Prompts of the bench model are made of few token ids, those of the demo model are texts of two kinds; in the middle the
traffic changes from one half of the ids, or kind, to the other. So few experts are hot, and the placement to start with
has the hot half of every layer on the lower ranks: what an operator meets whose placement was made for other traffic.
Prefill-heavy, so that a layer takes as long as its busiest rank computes. Two ranks on two cores have a core each. With
more ranks than cores the system shares the cores among them: rows and busy (CPU) time per rank tell of balance there,
tokens per second do not.

Every way is a run of its own, on the same prompts; `--ways off` measures only that and keeps what the folder has of the
others. Figures are of the last third of each traffic, of steps in which no experts move.

    python scripts/bench_balance.py MODEL --seconds 120 --out benchmarks/balance/2-ranks
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.placement import Placement
from moe_runtime.balancer.split import rank_loads
from moe_runtime.build import build_engine
from moe_runtime.config import EngineConfig
from moe_runtime.demo.build import ensure_demo_model
from moe_runtime.engine import Engine
from moe_runtime.sampling_params import SamplingParams
from moe_runtime.tokenizer import Tokenizer

WAYS = ("off", "eplb", "auto")
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 4
PARAMS = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
# EPLB plans anew at every look, so it must have the time to make its moves before the next one.
INTERVAL = {"off": 10, "eplb": 80, "auto": 10}
STEPS_A_SAMPLE = 10  # of rows and busy time

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One step: when it ended, its tokens, how long it took, and whether experts moved.

    Every few steps also `rows`, those of the busiest rank of each layer since the last time, of the next busiest, and
    so on, summed over layers; and `busy`, the CPU seconds of each rank since then.
    """

    at: float
    tokens: int
    seconds: float
    is_moving: bool
    rows: list[float] | None = None
    busy: list[float] | None = None


class Traffic:
    """Prompts of two kinds, the same for every way."""

    def __init__(self, vocab_size: int, hot_tokens: int, tokenizer: Tokenizer | None) -> None:
        self._random = np.random.default_rng(1)
        if tokenizer is None:
            ids = self._random.choice(np.arange(2, vocab_size), 2 * hot_tokens, replace=False)
            self._sources = [ids[:hot_tokens], ids[hot_tokens:]]
        else:
            self._sources = [np.array(tokenizer.encode(text)) for text in texts()]
        self._is_text = tokenizer is not None

    def prompts(self, kind: int) -> Iterator[list[int]]:
        source = self._sources[kind]
        while True:
            if self._is_text:
                start = int(self._random.integers(len(source) - PROMPT_TOKENS))
                yield source[start : start + PROMPT_TOKENS].tolist()
            else:
                yield self._random.choice(source, PROMPT_TOKENS).tolist()


def texts() -> tuple[str, str]:
    """Questions in English, and Python source."""
    from moe_runtime.demo.texts import QUESTIONS, TOPICS

    return "\n".join(question.format(topic) for topic in TOPICS for question in QUESTIONS), inspect.getsource(argparse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint directory, or demo")
    parser.add_argument("--ep-size", type=int, default=2)
    parser.add_argument("--redundant-experts", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a rank in a step (default 256)")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at a time for each rank (default 4)")
    parser.add_argument("--hot-tokens", type=int, default=16, help="token ids that prompts are made of (default 16)")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each of the two kinds of traffic")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/balance/2-ranks"))
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    setting = {name: getattr(options, name) for name in ("ep_size", "redundant_experts", "chunk", "seconds")}
    setting |= {"model": Path(options.model).name, "cores": os.cpu_count()}
    results: dict[str, Any] = {"setting": setting, "samples": {}}
    file = options.out / "balance.json"
    if file.exists() and json.loads(file.read_text())["setting"] == setting:
        results = json.loads(file.read_text())
    with tempfile.TemporaryDirectory() as folder:
        start = adverse_placement(options, Path(folder) / "placement.json")
        for way in options.ways:
            print(f"{way} ...", flush=True)
            results["samples"][way] = [asdict(sample) for sample in run(options, way, start)]
    results["samples"] = {way: results["samples"][way] for way in WAYS if way in results["samples"]}
    file.write_text(json.dumps(results) + "\n")
    runs = {way: [Sample(**sample) for sample in samples] for way, samples in results["samples"].items()}
    table = table_of(runs, setting)
    print(table)
    (options.out / "balance.md").write_text(table)
    plot(runs, setting, options.out / "balance.png")


def make_engine(options: argparse.Namespace, way: str, placement: Path | None) -> Engine:
    config = EngineConfig(
        options.model,
        ep_size=options.ep_size,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_batched_tokens=options.chunk,
        max_num_seqs=64,
        skip_tokenizer_init=True,
        balance=way,
        balance_interval=INTERVAL[way],
        redundant_experts=options.redundant_experts,
        placement=None if placement is None else str(placement),
        device="cpu",
    )
    return build_engine(config)


def make_traffic(options: argparse.Namespace, engine: Engine) -> Traffic:
    tokenizer = Tokenizer.from_path(ensure_demo_model()) if options.model == "demo" else None
    return Traffic(engine.model_config.vocab_size, options.hot_tokens, tokenizer)


def adverse_placement(options: argparse.Namespace, file: Path) -> Path:
    """Serve both kinds of traffic for a moment, and put each layer's hottest experts together on the lower ranks."""
    engine = make_engine(options, "off", None)
    try:
        traffic = make_traffic(options, engine)
        for kind in range(2):
            prompts = traffic.prompts(kind)
            for number in range(4):
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
        traffic = make_traffic(options, engine)
        pids = [rank.pid for rank in engine.executor.ranks]
        samples: list[Sample] = []
        number = running = 0
        counts_LE, busy_W = engine.expert_load().total, cpu_seconds(pids)
        begin = time.perf_counter()
        for kind in range(2):
            prompts, end = traffic.prompts(kind), (kind + 1) * options.seconds
            while (now := time.perf_counter() - begin) < end or running:
                while running < options.concurrency * options.ep_size and now < end:
                    engine.add_request(str(number), next(prompts), PARAMS)
                    number, running = number + 1, running + 1
                before, is_moving = engine.stats(), engine.is_migrating
                running -= sum(delta.finish_reason is not None for delta in engine.step())
                after = engine.stats()
                at = time.perf_counter() - begin
                tokens = after.prompt_tokens - before.prompt_tokens + after.generation_tokens - before.generation_tokens
                rows = busy = None
                if len(samples) % STEPS_A_SAMPLE == 0:
                    counts_before, busy_before = counts_LE, busy_W
                    counts_LE, busy_W = engine.expert_load().total, cpu_seconds(pids)
                    # a layer waits for its busiest rank, whichever that is
                    rows_LW = np.sort(rank_loads(counts_LE - counts_before, engine.placement().slots))
                    rows = rows_LW.sum(axis=0)[::-1].round().tolist()
                    busy = (busy_W - busy_before).round(2).tolist()
                samples.append(Sample(round(at, 4), tokens, round(at - now, 4), is_moving, rows, busy))
        print_decisions(engine)
        return samples
    finally:
        engine.close()


def print_decisions(engine: Engine) -> None:
    for decision in engine.decisions():
        figures = {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in decision.items()
            if name not in ("outcome", "at", "moves_experts") and value is not None
        }
        print(f"  {figures}", flush=True)


def cpu_seconds(pids: list[int]) -> Floats:
    """float64 [W]: what processes have computed so far, all their threads."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return np.array([(int(fields[11]) + int(fields[12])) / ticks for fields in found])


def table_of(runs: dict[str, list[Sample]], setting: dict[str, Any]) -> str:
    seconds = setting["seconds"]
    lines = [
        f"{setting['model']}, {setting['ep_size']} ranks on {setting['cores']} cores, {setting['redundant_experts']} "
        f"redundant experts a rank. Prompts of {PROMPT_TOKENS} tokens with {OUTPUT_TOKENS} new ones, "
        f"{setting['chunk']} tokens of a rank in a step. Of the last third of each {seconds:g} s, steps in which no "
        "experts move; the p99 are of all steps of the traffic.",
        "",
        "| traffic | balance | tokens/s | to off | rows, max/mean | busy time, max/mean | p99 step, ms | when moving |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, name in enumerate(("first", "shifted")):
        base = None
        for way, samples in runs.items():
            part = [sample for sample in samples if kind * seconds <= sample.at < (kind + 1) * seconds]
            late = [s for s in part if s.at >= (kind + 2 / 3) * seconds and not s.is_moving]
            cells = ["", "", "", ""]
            if late:
                rate = sum(s.tokens for s in late) / sum(s.seconds for s in late)
                base = rate if way == "off" else base
                cells = [f"{rate:.0f}", f"{rate / base:.2f}" if base else ""]
                cells += [f"{max_over_mean([getattr(s, of) for s in late]):.2f}" for of in ("rows", "busy")]
            cells += [p99([s.seconds for s in part if s.is_moving == is_moving]) for is_moving in (False, True)]
            lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def p99(seconds: list[float]) -> str:
    return f"{np.percentile(seconds, 99) * 1e3:.0f}" if seconds else ""


def max_over_mean(of_ranks: list[list[float] | None]) -> float:
    total_W = np.sum([values for values in of_ranks if values is not None], axis=0)
    return float(np.max(total_W) / np.mean(total_W))


def plot(runs: dict[str, list[Sample]], setting: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seconds = setting["seconds"]
    figure, axes = plt.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    for way, samples in runs.items():
        edges = np.arange(0, 2 * seconds + 1, max(2.0, seconds / 20))
        (tokens, _), (steps, _), (busy, _) = (
            np.histogram([s.at for s in samples], edges, weights=weights)
            for weights in ([s.tokens for s in samples], np.ones(len(samples)), [s.seconds for s in samples])
        )
        axes[0].step(edges[1:], tokens / np.diff(edges), label=way)
        axes[1].step(edges[1:], busy / np.maximum(steps, 1) * 1e3)
        measured = [s for s in samples[1:] if s.rows]
        axes[2].plot([s.at for s in measured], [max_over_mean([s.rows]) for s in measured])
    axes[0].legend(title="balance")
    for panel, label in zip(axes, ("tokens/s", "step, ms", "max/mean rows over ranks"), strict=True):
        panel.set_ylabel(label)
        panel.axvline(seconds, color="0.7", linestyle=":")
        panel.set_ylim(bottom=0)
    axes[2].set_xlabel("seconds; the traffic changes in the middle")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
