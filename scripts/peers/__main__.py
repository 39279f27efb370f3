"""Compare moe_runtime with llama.cpp, vLLM and transformers on the CPU, in one run. See docs/benchmarks.md.

Start it with scripts/bench_peers. The engines take turns in each repetition, and the machine's rates are measured
before and after each turn. The first run installs the other engines into .peers and makes the model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from make_bench_model import SHAPES

from peers.conductor import OURS, OURS_QUANTIZED, PEERS, Case, Conductor, DisagreementError, Plan, say
from peers.drivers import DriverError
from peers.report import markdown, plot

PROMPT, NEW_TOKENS = 128, 64
CASES = (*(Case(batch, PROMPT, NEW_TOKENS) for batch in (1, 8, 32)), Case(1, 2048, 1))
BENCH_CASES = (*CASES, Case(4, 2048, 1))
QUICK_CASES = (*(Case(batch, PROMPT, 8) for batch in (1, 8)), Case(1, 1024, 1))
OLMOE_CASES = tuple(Case(batch, PROMPT, NEW_TOKENS) for batch in (1, 16))
QUICK_OLMOE_CASES = (Case(1, PROMPT, 8),)
# Families that an engine does not run here, and why.
UNTRIED = "not tried with this family"
LACKS = {"vllm": {"deepseek_v3": UNTRIED, "gpt_oss": UNTRIED}}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench_peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*OURS, *OURS_QUANTIZED, *PEERS]
    parser.add_argument("--engines", nargs="+", choices=known, metavar="NAME", help=f"some of {', '.join(known)}")
    parser.add_argument("--repetitions", type=int, help="default 5")
    parser.add_argument("--quick", action="store_true", help="one repetition of small cases: does everything work?")
    parser.add_argument("--model", choices=list(SHAPES), default="bench", help="a shape (default bench)")
    parser.add_argument(
        "--quantization", choices=["int8", "int4"], help="quantise experts, attention and head; with llama.cpp alone"
    )
    parser.add_argument("--avx2", action="store_true", help="no engine uses instructions beyond AVX2")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/peers"), help="folder for the results")
    options = parser.parse_args()
    usual = (*OURS, *PEERS) if options.quantization is None else ("ours", *OURS_QUANTIZED, "llama.cpp")
    options.engines = options.engines or list(usual)
    if "ours" not in options.engines:
        parser.error("--engines: 'ours' is missing; its gate counts the experts that the floor is made of")
    repetitions = options.repetitions or (1 if options.quick else 5)
    if repetitions < 1:
        parser.error(f"--repetitions: {options.repetitions} is not allowed; it must be at least 1")

    lacks = lacking(options.model) | ({"vllm": "not tried with AVX2 alone"} if options.avx2 else {})
    absent = {name: why for name, why in lacks.items() if name in options.engines}
    engines = tuple(name for name in known if name in options.engines and name not in absent)
    if options.model == "olmoe":
        cases = QUICK_OLMOE_CASES if options.quick else OLMOE_CASES
        # Not every machine has room for two copies of 14 GB.
        together = tuple((name,) for name in engines)
    else:
        is_whole = options.model == "bench" and options.quantization is None
        cases = QUICK_CASES if options.quick else BENCH_CASES if is_whole else CASES
        together = (engines,)
    signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    try:
        limits = options.avx2, options.quantization
        plan = Plan(options.model, cases, together, repetitions, options.out / "logs", absent, *limits)
        results: dict[str, Any] = {"machine": machine()} | Conductor(plan).run()
    except KeyboardInterrupt:
        print("interrupted; everything has ended", file=sys.stderr)
        return 130
    except (DriverError, DisagreementError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = markdown(results)
    options.out.mkdir(parents=True, exist_ok=True)
    name = "-".join(filter(None, [plan.shape, plan.quantization, "avx2" if plan.avx2 else None]))
    (options.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(text)
    plot(results, options.out / f"{name}.png")
    print(text)
    say(f"done in {(time.monotonic() - started) / 60:.1f} min; results are in {options.out}")
    return 0


def lacking(model: str) -> dict[str, str]:
    """The engines that do not run a shape, and why."""
    if model == "olmoe":
        return dict.fromkeys(PEERS, "the model has no weights on disk")
    family = SHAPES[model].config()["model_type"]
    return {engine: families[family] for engine, families in LACKS.items() if family in families}


def machine() -> dict[str, Any]:
    """The machine in words, as Linux describes it."""
    cpu = dict(
        map(str.strip, line.split(":", 1)) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{cpu['model name']} (family {cpu['cpu family']}, model {cpu['model']})",
        "instruction_sets": [name for name in wanted if name in cpu["flags"].split()],
        "cache": cpu["cache size"],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"Linux {platform.release()}",
        "python": platform.python_version(),
    }


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
