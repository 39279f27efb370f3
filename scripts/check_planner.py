"""Beside each other: steps that the planner predicts for this machine, and steps that the engine takes.

Measures this machine's hardware profile, then runs the engine on the demo and on the bench model with 1, 2 and 4 ranks:
decoding with 1, 8 and 32 sequences, and prompts. Predictions get the loads that the router really gave. With 1 and 2
ranks the time of a step is compared; with more ranks than cores, which take turns, the processor time of all ranks.
What is beyond 20 percent is marked; the exit code is 1 then.

Run it on a machine that does nothing else: python scripts/check_planner.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from make_bench_model import ensure_bench_model

from moe_runtime.build import build_engine
from moe_runtime.config import EngineConfig
from moe_runtime.planner.hardware import Hardware
from moe_runtime.planner.hardware_file import load_hardware, save_hardware
from moe_runtime.planner.measure import measure
from moe_runtime.planner.measure_engine import StepTimer
from moe_runtime.planner.predict import Workload, predict
from moe_runtime.planner.routing import LoadRouting, chosen_layers
from moe_runtime.planner.shape import ModelShape

ALLOWED = 0.2
PROMPT, PREFILLS = 32, ((1, 512), (4, 512))  # sequences, tokens of each


@dataclass(frozen=True)
class Row:
    """One comparison, in seconds; `what` is "step" (wall clock) or "busy" (processor time of all ranks)."""

    model: str
    ranks: int
    phase: str
    sequences: int
    length: int
    what: str
    predicted: float
    measured: float
    parts: dict[str, float]

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def check(model: str, ranks: int, hardware: Hardware, options: argparse.Namespace) -> Iterator[Row]:
    """All cases of a model and a number of ranks."""
    path = str(ensure_bench_model("bench")) if model == "bench" else model
    config = EngineConfig(
        model=path,
        ep_size=ranks,
        dtype="bfloat16",
        device="cpu",
        max_num_seqs=max(options.batches),
        max_model_len=1024,
        max_num_batched_tokens=4096,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=256 << 20,
    )
    engine = build_engine(config)
    try:
        shape, timer = ModelShape.of(engine.model_config, "bfloat16", model), StepTimer(engine)
        rng = np.random.default_rng(0)

        def prompts(count: int, length: int) -> list[list[int]]:
            return rng.integers(3, engine.model_config.vocab_size, (count, length)).tolist()

        def loads() -> dict[str, np.ndarray]:
            return engine.expert_load().tokens

        timer.run(prompts(2, 16), 16)
        cases = [("decode", batch, PROMPT) for batch in options.batches]
        for phase, count, length in [*cases, *(("prefill", *case) for case in PREFILLS)]:
            before = {name: counts.copy() for name, counts in loads().items()}
            new_tokens = options.steps if phase == "decode" else 6
            runs = [timer.run(prompts(count, length), new_tokens) for _ in range(options.repetitions)]
            used = loads()[phase] - before[phase]
            seconds = float(np.median([getattr(run, phase) for run in runs]))
            busy = [getattr(run, f"{phase}_busy") for run in runs]
            keys = length + new_tokens // 2 if phase == "decode" else length
            routing = LoadRouting(used, shape.top_k, exact=True)
            placement = engine.placement()
            layers = chosen_layers(placement.num_layers)
            kept = type(placement)(
                placement.slots[layers], placement.num_experts, tuple(np.array(placement.layer_ids)[layers].tolist())
            )
            found = predict(shape, hardware, kept, routing, Workload(phase, count, keys))
            common = (model, ranks, phase, count, keys)
            if hardware.cores is not None and ranks > hardware.cores:
                yield Row(*common, "busy", found.busy_seconds, float(np.median(busy)), found.parts)
            else:
                yield Row(*common, "step", found.step_seconds, seconds, found.parts)
    finally:
        engine.close()


def line(row: Row) -> str:
    """A row of the table, in Markdown."""
    most = sorted(row.parts, key=row.parts.__getitem__, reverse=True)[:3]
    shares = ", ".join(f"{name} {row.parts[name] / sum(row.parts.values()):.0%}" for name in most)
    mark = "" if abs(row.error) <= ALLOWED else " **"
    cells = (row.model, row.ranks, row.phase, row.sequences, row.length, row.what)
    figures = f"{row.predicted * 1e3:.2f} | {row.measured * 1e3:.2f} | {row.error:+.0%}{mark} | {shares}"
    return "| " + " | ".join(map(str, cells)) + f" | {figures} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "bench"], help="demo, bench, or directories")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=48, help="decode steps of a run")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--hardware", help="a profile measured before; the default measures anew")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "benchmarks" / "planner")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.hardware:
        hardware = load_hardware(options.hardware)
    else:
        hardware = measure(f"{len(os.sched_getaffinity(0))} cores", say=lambda text: print(text, file=sys.stderr))
        save_hardware(hardware, options.output / "measured.yaml")
    print("| model | ranks | phase | sequences | length | what | predicted ms | measured ms | error | most of it |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for model in options.models:
        for ranks in options.ranks:
            for row in check(model, ranks, hardware, options):
                rows.append(row)
                print(line(row), flush=True)
    beyond = [row for row in rows if abs(row.error) > ALLOWED]
    print(f"\n{len(rows) - len(beyond)} of {len(rows)} within {ALLOWED:.0%}")
    content = [asdict(row) | {"error": row.error} for row in rows]
    (options.output / "check.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.output / "check.md").write_text("\n".join(map(line, rows)) + "\n")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
