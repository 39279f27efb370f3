"""Measures how much a long prompt slows running streams, with and without the bound `decode_slowdown`.

    python scripts/bench_scheduling.py                # one rank
    python scripts/bench_scheduling.py --ep-size 2

Streams of the bench model run; then a prompt of 4,000 tokens arrives. The time of a token is that since the stream's
token before it. The table has its 95th percentile before the prompt arrives and until the prompt's first token comes,
and the prompt's own time to its first token, also when nothing else runs. Settings are measured in turn; a setting
begins without knowledge of step times. The table has medians of the repetitions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_runtime import SamplingParams
from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.engine import Engine
from moe_runtime.engine.step_time import StepTime

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from make_bench_model import ensure_bench_model

OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "scheduling"
STREAM_PROMPT, LONG_PROMPT = 64, 4000
TOKENS_BEFORE = 40  # of each stream, before the long prompt arrives
CONTEXT = 4096
LONG = "long"


@dataclass
class Run:
    """One setting, once: seconds. `before` and `during` are the times of the streams' tokens."""

    slowdown: float
    before: list[float]
    during: list[float]
    first_token: float
    steps: int

    def summary(self) -> dict[str, float]:
        before, during = percentile(self.before), percentile(self.during)
        return {
            "p95_before": before,
            "p95_during": during,
            "ratio": during / before,
            "median_ratio": statistics.median(self.during) / statistics.median(self.before),
            "first_token": self.first_token,
            "steps": self.steps,
        }


def percentile(values: list[float], share: float = 0.95) -> float:
    """The least value that at least `share` of the values do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


class Streams:
    """Requests of an engine that is stepped by hand, and when each stream's tokens came."""

    def __init__(self, engine: Engine, count: int, rng: random.Random) -> None:
        self._engine = engine
        self._rng = rng
        self.ids = [f"stream {index}" for index in range(count)]
        self._last: dict[str, float] = {}
        for request_id in self.ids:
            self.add(request_id, STREAM_PROMPT, CONTEXT - STREAM_PROMPT)

    def add(self, request_id: str, length: int, max_tokens: int) -> None:
        prompt = [self._rng.randrange(self._engine.model_config.vocab_size) for _ in range(length)]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._engine.add_request(request_id, prompt, params)

    def step(self) -> tuple[list[float], bool]:
        """Times of the streams' tokens in a step, and whether the long prompt's token came."""
        deltas = self._engine.step()
        now = time.perf_counter()
        times = [now - self._last[each.request_id] for each in deltas if each.request_id in self._last]
        self._last |= {each.request_id: now for each in deltas if each.request_id != LONG and each.token_ids}
        return times, any(each.request_id == LONG for each in deltas)

    def end(self) -> None:
        for request_id in self.ids:
            self._engine.abort(request_id)
        while self._engine.has_work:
            self._engine.step()


def measure(engine: Engine, slowdown: float, num_streams: int, seed: int) -> Run:
    engine._scheduler.step_time = StepTime(slowdown)
    streams = Streams(engine, num_streams, random.Random(seed))
    before: list[float] = []
    during: list[float] = []
    for _ in range(TOKENS_BEFORE if num_streams else 0):
        before += streams.step()[0]
    streams.add(LONG, LONG_PROMPT, 1)
    start, steps, came = time.perf_counter(), 0, False
    while not came:
        times, came = streams.step()
        during += times
        steps += 1
    first_token = time.perf_counter() - start
    streams.end()
    return Run(slowdown, before, during, first_token, steps)


def table_of(runs: list[Run], alone: list[float], num_streams: int) -> str:
    lines = [
        "| `decode_slowdown` | p95 time per token before, ms | while the prompt runs, ms | ratio | median ratio "
        f"| prompt of {LONG_PROMPT} tokens: first token, s | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for slowdown in sorted({run.slowdown for run in runs}, reverse=True):
        found = [run.summary() for run in runs if run.slowdown == slowdown]
        middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
        lines.append(
            f"| {slowdown:g} | {middle['p95_before'] * 1e3:.1f} | {middle['p95_during'] * 1e3:.1f} "
            f"| {middle['ratio']:.2f} | {middle['median_ratio']:.2f} "
            f"| {middle['first_token']:.2f} | {middle['steps']:.0f} |"
        )
    lines.append(f"| nothing else runs | | | | | {statistics.median(alone):.2f} | |")
    return f"{num_streams} streams, medians of repetitions.\n\n" + "\n".join(lines) + "\n"


def rounded(value: object) -> object:
    """A JSON value with times to a hundredth of a millisecond."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 5) if isinstance(value, float) else value


def plot(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for slowdown in sorted({run.slowdown for run in runs}, reverse=True):
        times = sorted(each for run in runs if run.slowdown == slowdown for each in run.during)
        shares = [(index + 1) / len(times) for index in range(len(times))]
        axes.step([each * 1e3 for each in times], shares, where="post", label=f"decode_slowdown {slowdown:g}")
    times = sorted(each for run in runs for each in run.before)
    shares = [(index + 1) / len(times) for index in range(len(times))]
    axes.step([each * 1e3 for each in times], shares, where="post", color="black", label="before the prompt")
    axes.set(xscale="log", xlabel="time per token of a stream, ms", ylabel="share of tokens", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="bench", help="a shape of make_bench_model.py")
    parser.add_argument("--ep-size", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--slowdowns", default="inf,2", help="values of decode_slowdown")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/scheduling/N-ranks")
    options = parser.parse_args()
    out = options.out or OUT / f"{options.ep_size}-ranks"
    slowdowns = [float(word) for word in options.slowdowns.split(",")]
    config = EngineConfig(
        str(ensure_bench_model(options.shape)),
        ep_size=options.ep_size,
        dtype="bfloat16",
        device="cpu",
        skip_tokenizer_init=True,
        max_model_len=CONTEXT,
        max_num_seqs=16,
    )
    engine = build_engine(config)
    try:
        measure(engine, math.inf, options.streams, 0)  # warms up
        runs, alone = [], []
        for repetition in range(options.repetitions):
            alone.append(measure(engine, math.inf, 0, repetition).first_token)
            for slowdown in slowdowns:
                runs.append(measure(engine, slowdown, options.streams, repetition))
                print(f"{slowdown:g}", {k: round(v, 4) for k, v in runs[-1].summary().items()}, flush=True)
        kernels = sorted(set(engine.executor.ranks[0].kernels.values()))
    finally:
        engine.close()
    out.mkdir(parents=True, exist_ok=True)
    table = table_of(runs, alone, options.streams)
    print(table)
    (out / "table.md").write_text(table)
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "kernels": kernels}
    settings = {
        "shape": options.shape,
        "ep_size": options.ep_size,
        "streams": options.streams,
        "max_num_batched_tokens": config.max_num_batched_tokens,
    }
    samples = [rounded({**asdict(run), "slowdown": f"{run.slowdown:g}", **run.summary()}) for run in runs]
    content = {**machine, **settings, "alone_first_token": alone, "runs": samples}
    (out / "results.json").write_text(json.dumps(content) + "\n")
    plot(runs, out / "time-per-token.png")


if __name__ == "__main__":
    main()
