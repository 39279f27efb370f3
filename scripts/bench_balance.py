"""Measures the gain of balancing while serving: two kinds of skewed traffic, with the balancer `off`, `eplb`, `auto`.

The bench model's prompts consist of few token ids, the demo model's are texts of two kinds. In the middle, the traffic
changes from one half of the ids (or one kind) to the other. So few experts are hot. The initial placement has the hot
half of every layer on the lower ranks, like a placement made for other traffic. The traffic is prefill-heavy, so that a
layer takes as long as its busiest rank computes. Two ranks on two cores have a core each. With more ranks than cores,
the system shares the cores among the ranks. Then rows and busy (CPU) time per rank show the balance, tokens per second
do not.

Each balancer setting is a separate run on the same prompts. Only the machine changes the result of `off`; it runs for
half as long before the others and again after them. `--ways off` measures only `off` and keeps the folder's results of
the others.

    python scripts/bench_balance.py MODEL --seconds 100 --out benchmarks/balance/2-ranks

takes 11 minutes: 200 seconds per setting, and some seconds for each start.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.placement import Placement
from moe_runtime.balancer.split import rank_loads
from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.demo.checkpoint import ensure_demo_model
from moe_runtime.engine.engine import Engine
from moe_runtime.text.tokenizer import Tokenizer
from moe_runtime.types.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from balance_bench.report import OUTPUT_TOKENS, PROMPT_TOKENS, Run, Sample, max_over_mean, plot, table_of

WAYS = ("off", "eplb", "auto")
PARAMS = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
# EPLB makes a new plan in every interval, so the interval must be long enough for its moves.
INTERVAL = {"off": 10, "eplb": 80, "auto": 10}
STEPS_A_SAMPLE = 10  # steps between two samples of rows and busy time
PROGRESS_SECONDS = 10.0

Floats = npt.NDArray[np.float64]


class Traffic:
    """Prompts of two kinds, the same for every balancer setting."""

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
    parser.add_argument("--seconds", type=float, default=100.0, help="of each of the two kinds of traffic")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/balance/2-ranks"))
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    setting = {name: getattr(options, name) for name in ("ep_size", "redundant_experts", "chunk", "seconds")}
    setting |= {"model": Path(options.model).name, "cores": os.cpu_count()}
    file = options.out / "balance.json"
    saved = json.loads(file.read_text()) if file.exists() else {}
    results = saved.get("runs", {}) if saved.get("setting") == setting else {}
    measured: dict[str, list[Run]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory() as folder:
        start = adverse_placement(options, Path(folder) / "placement.json")
        for way in sorted(options.ways, key=WAYS.index) + ["off"] * ("off" in options.ways):
            measured[way].append(run(options, way, start))
    results |= {way: [asdict(run) for run in runs] for way, runs in measured.items()}
    file.write_text(json.dumps({"setting": setting, "runs": results}) + "\n")
    ways = {way: [Run.from_dict(run) for run in results[way]] for way in WAYS if way in results}
    table = table_of(ways, setting)
    print(table)
    (options.out / "balance.md").write_text(table)
    plot(ways, options.out / "balance.png")


def make_engine(options: argparse.Namespace, way: str, placement: Path | None) -> Engine:
    config = EngineConfig(
        options.model,
        ep_size=options.ep_size,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_batched_tokens=options.chunk,
        decode_slowdown=math.inf,  # chunks of the size that the options say
        max_num_seqs=64,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
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
    """Serve both kinds of traffic briefly, and put each layer's hottest experts together on the lower ranks."""
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


def run(options: argparse.Namespace, way: str, placement: Path) -> Run:
    seconds = options.seconds / (2 if way == "off" else 1)
    print(f"{way}: loading, then twice {seconds:g} s", flush=True)
    engine = make_engine(options, way, placement)
    try:
        traffic = make_traffic(options, engine)
        pids = [rank.pid for rank in engine.executor.ranks]
        samples: list[Sample] = []
        number = running = num_tokens = 0
        reported = 0.0
        counts_LE, busy_W = engine.expert_load().total, cpu_seconds(pids)
        begin = time.perf_counter()
        for kind in range(2):
            prompts, end = traffic.prompts(kind), (kind + 1) * seconds
            while (now := time.perf_counter() - begin) < end or running:
                while running < options.concurrency * options.ep_size and now < end:
                    engine.add_request(str(number), next(prompts), PARAMS)
                    number, running = number + 1, running + 1
                is_moving = engine.is_migrating
                running -= sum(delta.finish_reason is not None for delta in engine.step())
                at, stats = time.perf_counter() - begin, engine.stats()
                tokens, num_tokens = -num_tokens, stats.prompt_tokens + stats.generation_tokens
                tokens += num_tokens
                rows = busy = None
                if len(samples) % STEPS_A_SAMPLE == 0:
                    counts_before, busy_before = counts_LE, busy_W
                    counts_LE, busy_W = engine.expert_load().total, cpu_seconds(pids)
                    # a layer waits for its busiest rank, which may be any rank
                    rows_LW = np.sort(rank_loads(counts_LE - counts_before, engine.placement().slots))
                    rows = rows_LW.sum(axis=0)[::-1].round().tolist()
                    busy = (busy_W - busy_before).round(2).tolist()
                samples.append(Sample(round(at, 4), tokens, round(at - now, 4), is_moving, rows, busy))
                if at >= reported + PROGRESS_SECONDS:
                    reported = at
                    even = next((max_over_mean([s.rows]) for s in reversed(samples) if s.rows and any(s.rows)), 0.0)
                    moving = ", experts move" if is_moving else ""
                    print(f"  {at:.0f} s: {num_tokens} tokens, rows max/mean {even:.2f}{moving}", flush=True)
        print_decisions(engine)
        return Run(seconds, samples, engine.decisions())
    finally:
        engine.close()


def print_decisions(engine: Engine) -> None:
    for decision in engine.decisions():
        figures = {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in decision.items()
            if name not in ("outcome", "at", "moves_experts", "margin") and value is not None
        }
        print(f"  {figures}", flush=True)


def cpu_seconds(pids: list[int]) -> Floats:
    """float64 [W]: CPU time of processes so far, of all their threads."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return np.array([(int(fields[11]) + int(fields[12])) / ticks for fields in found])


if __name__ == "__main__":
    main()
