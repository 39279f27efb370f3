"""Compares the planner's predictions for this machine with measured steps of the engine.

Measures this machine's hardware profile, then runs the engine on the demo and on the bench model with 1, 2 and 4 ranks:
decoding with 1, 8 and 32 sequences, and prompts. Predictions use the loads that the gate really produced. With 1 and 2
ranks, the time of a step is compared. With more ranks than cores, ranks take turns, and the processor time of all ranks
is compared. Errors above 20 percent are marked, and the exit code is then 1.

On a shared machine, the rates of reading and multiplying change from second to second. So both rates are measured
before and after each short run, and the prediction for that run uses the profile at these rates. The median of the
runs' ratios counts. A run is repeated if the machine was much slower before or after it, because of other work.

Run it on a machine that does nothing else: python scripts/check_planner.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.kernels.cpu.loader import load
from moe_runtime.planner.hardware import Hardware
from moe_runtime.planner.hardware_file import load_hardware, save_hardware
from moe_runtime.planner.measure import measure
from moe_runtime.planner.measure_engine import StepTimer, StepTimes
from moe_runtime.planner.pace import Pace
from moe_runtime.planner.predict import Phase, Workload, predict
from moe_runtime.planner.routing import LoadRouting, chosen_layers
from moe_runtime.planner.shape import ModelShape

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where PYTHONSAFEPATH is set

from make_bench_model import ensure_bench_model

ALLOWED = 0.2
HEAD = (
    "| model | ranks | phase | sequences | length | what | predicted ms | measured ms | error | pace | most of it |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)
LEAST_PACE, MOST_RUNS = 0.85, 3  # share of the matrix rate; runs allowed per run that counts
PROMPT = 32  # tokens, before decoding
PREFILLS: tuple[tuple[Phase, int, int], ...] = (("prefill", 1, 512), ("prefill", 4, 512))  # sequences, tokens of each


@dataclass(frozen=True)
class Row:
    """One comparison, in seconds.

    Attributes:
        what: "step" (wall clock) or "busy" (processor time of all ranks).
        error: the median of the runs' predicted / measured, less 1.
        pace: the machine's matrix rate in these runs, as a share of the profile's; the median.
        runs: number of runs that count.
        disturbed: runs with a low or changing pace. They do not count unless there are too few others.
        parts: of the prediction.
    """

    model: str
    ranks: int
    phase: str
    sequences: int
    length: int
    what: str
    predicted: float
    measured: float
    error: float
    pace: float
    runs: int
    disturbed: int
    parts: dict[str, float]


Pair = tuple[tuple[float, float], tuple[float, float]]


def at(hardware: Hardware, paces: Pair) -> Hardware:
    """The profile at the mean of the paces."""
    read, rate = np.mean(paces, axis=0).tolist()
    return hardware.at_pace(read, rate)


def even(paces: Pair) -> bool:
    """Whether the machine's rate before and after a run was about that of the profile."""
    rates = [rate for _, rate in paces]
    return min(rates) > LEAST_PACE and min(rates) > LEAST_PACE * max(rates)


def check(model: str, ranks: int, hardware: Hardware, pace: Pace, options: argparse.Namespace) -> Iterator[Row]:
    """All cases of a model and a number of ranks."""
    cores = hardware.cores or 1
    path = str(ensure_bench_model("bench")) if model == "bench" else model
    config = EngineConfig(
        model=path,
        ep_size=ranks,
        dtype="bfloat16",
        device="cpu",
        max_num_seqs=max(options.batches),
        max_model_len=1024,
        max_num_batched_tokens=4096,
        decode_slowdown=math.inf,  # a batch's prompts run in one step
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
    )
    engine = build_engine(config)
    try:
        shape, timer = ModelShape.of(engine.model_config, "bfloat16", model), StepTimer(engine)
        rng = np.random.default_rng(0)

        def prompts(count: int, length: int) -> list[list[int]]:
            return rng.integers(3, engine.model_config.vocab_size, (count, length)).tolist()

        def loads() -> Mapping[str, np.ndarray]:
            return engine.expert_load().tokens

        timer.run(prompts(2, 16), 16)
        cases: list[tuple[Phase, int, int]] = [("decode", batch, PROMPT) for batch in options.batches]
        for phase, count, length in [*cases, *PREFILLS]:
            before = {name: counts.copy() for name, counts in loads().items()}
            new_tokens = options.steps if phase == "decode" else 6
            wanted = options.repetitions
            ran: list[tuple[StepTimes, Pair]] = []
            now = pace.now()
            while len(ran) < MOST_RUNS * wanted and sum(even(around) for _, around in ran) < wanted:
                run, before_run = timer.run(prompts(count, length), new_tokens), now
                now = pace.now()
                ran.append((run, (before_run, now)))
            quiet = [each for each in ran if even(each[1])]
            ran, disturbed = (quiet, len(ran) - len(quiet)) if len(quiet) == wanted else (ran, len(ran) - len(quiet))
            runs, paces = zip(*ran, strict=True)
            used = loads()[phase] - before[phase]
            keys = length + new_tokens // 2 if phase == "decode" else length
            routing = LoadRouting(used, shape.top_k, exact=True)
            placement = engine.placement()
            layers = chosen_layers(placement.num_layers)
            kept = type(placement)(
                placement.slots[layers], placement.num_experts, tuple(np.array(placement.layer_ids)[layers].tolist())
            )
            workload, what = Workload(phase, count, keys), "busy" if ranks > cores else "step"
            found = [predict(shape, at(hardware, around), kept, routing, workload) for around in paces]
            predicted = [each.busy_seconds if what == "busy" else each.step_seconds for each in found]
            measured = [getattr(run, f"{phase}_busy" if what == "busy" else phase) for run in runs]
            ratio = float(np.median(np.divide(predicted, measured)))
            middle = sorted(range(len(runs)), key=lambda index: predicted[index])[len(runs) // 2]
            times = (float(np.median(predicted)), float(np.median(measured)), ratio - 1)
            rate = float(np.median([around[1] for both in paces for around in both]))
            yield Row(model, ranks, phase, count, keys, what, *times, rate, len(runs), disturbed, found[middle].parts)
    finally:
        engine.close()


def case(row: Row) -> tuple[str | int, ...]:
    """The case that a row compares."""
    return row.model, row.ranks, row.phase, row.sequences, row.length


def line(row: Row) -> str:
    """A row of the table, in Markdown."""
    most = sorted(row.parts, key=row.parts.__getitem__, reverse=True)[:3]
    shares = ", ".join(f"{name} {row.parts[name] / sum(row.parts.values()):.0%}" for name in most)
    mark = "" if abs(row.error) <= ALLOWED else " **"
    cells = (row.model, row.ranks, row.phase, row.sequences, row.length, row.what)
    figures = (
        f"{row.predicted * 1e3:.2f} | {row.measured * 1e3:.2f} | {row.error:+.0%}{mark} | {row.pace:.2f} | {shares}"
    )
    return "| " + " | ".join(map(str, cells)) + f" | {figures} |"


def write(rows: Sequence[Row], hardware: Hardware, folder: Path) -> int:
    """Write check.json and check.md, and print how many rows are within the limit; returns 1 unless all are."""
    beyond = [row for row in rows if abs(row.error) > ALLOWED]
    title = f"{len(rows) - len(beyond)} of {len(rows)} within {ALLOWED:.0%}"
    print(f"\n{title}")
    about = (
        f"Steps predicted and measured on {hardware.name}, {load().instruction_set}: {title}, `**` marks the others."
    )
    (folder / "check.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (folder / "check.md").write_text("\n".join([about, "", *HEAD, *map(line, rows)]) + "\n")
    return 1 if beyond else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "bench"], help="demo, bench, or directories")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a run")
    parser.add_argument("--repetitions", type=int, default=8, help="runs of a case")
    parser.add_argument("--hardware", help="a profile measured before; the default measures anew")
    parser.add_argument("--add", action="store_true", help="keep the other cases of the last run in the output")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "benchmarks" / "planner")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.hardware:
        hardware = load_hardware(options.hardware)
    else:
        hardware = measure(f"{len(os.sched_getaffinity(0))} cores", say=lambda text: print(text, file=sys.stderr))
        save_hardware(hardware, options.output / "measured.yaml")
    print("\n".join(HEAD))
    rows, pace = [], Pace(load(), hardware)
    for model in options.models:
        for ranks in options.ranks:
            for row in check(model, ranks, hardware, pace, options):
                rows.append(row)
                print(line(row), flush=True)
    earlier = options.output / "check.json"
    if options.add and earlier.exists():
        done = {case(row) for row in rows}
        kept = [row for row in (Row(**each) for each in json.loads(earlier.read_text())) if case(row) not in done]
        rows = kept + rows
    return write(rows, hardware, options.output)


if __name__ == "__main__":
    sys.exit(main())
