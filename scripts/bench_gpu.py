"""Check and time the GPU path on one GPU, in under nine minutes; needs only torch, triton and transformers.

1. Check every op against a float64 reference, with poisoned outputs.
2. Time the expert MLP, attention and the ops between, for the layer shapes of four open models. Compare them with
   torch's own ops and with two floors: bytes / measured copy rate, operations / measured matrix rate.
3. Measure whole-model tokens per second, and those of transformers, in separate processes.

Results go to a folder: `bench_gpu.md` (also printed last), `bench_gpu.json`, and `bench_gpu.png` if matplotlib is
installed. Fails if a check fails. The report names what was skipped for lack of time.

    python scripts/bench_gpu.py [--out FOLDER] [--cpu]

`--cpu` does all of it on the CPU in small sizes, with the torch forms. It checks the script; its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_runtime.kernels import ops

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from gpu_bench import timings
from gpu_bench.checks import Check, check_all
from gpu_bench.model import ENGINES
from gpu_bench.shapes import SHAPES, SMALL_SHAPES, SMALL_TOKENS, TOKENS
from gpu_bench.timings import Clock, Row

BUDGET_S = 8.5 * 60
MODEL_S = 75.0  # seconds reserved for each whole-model process
MEMORY_SHARE = 0.35  # of the GPU's memory, for one layer's experts
SCRIPTS = Path(__file__).parent


class Budget:
    """The remaining seconds, and the names of what was skipped for lack of time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def spend(self, name: str, rows: Iterator[Row], keep: float) -> list[Row]:
        """Take rows until only `keep` seconds of the budget are left."""
        found: list[Row] = []
        while self.left > keep:
            row = next(rows, None)
            if row is None:
                return found
            found.append(row)
            print(f"{self.left:4.0f} s left  {row.what}, {row.shape}, {row.case}: {row.ours_us:.1f} us", flush=True)
        self.left_out.append(name)
        return found


def time_ops(budget: Budget, device: torch.device, keep: float) -> tuple[list[Row], Clock]:
    """All timings, the most important first."""
    small = device.type != "cuda"
    clock = Clock(device, repeats=3 if small else 9)
    tokens = SMALL_TOKENS if small else TOKENS
    memory = 1e9 if small else torch.cuda.get_device_properties(device).total_memory
    shapes = [shape.within(memory * MEMORY_SHARE) for shape in (SMALL_SHAPES if small else SHAPES)]
    qwen, gpt_oss = shapes[1], shapes[-1]
    parts: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        (f"experts, {shape.name}", lambda shape=shape: timings.experts(shape, tokens, clock)) for shape in shapes
    ]
    decodes = ((1, 20), (3, 50)) if small else ((1, 1024), (32, 1024), (128, 1024), (1, 8192), (32, 8192))
    parts += [
        ("decode attention", lambda: timings.decode_attention(qwen, decodes, clock)),
        ("prefill attention", lambda: timings.prefill_attention(qwen, (40,) if small else (2048, 8192), clock)),
        ("small ops", lambda: timings.small_ops(gpt_oss, (1, 9) if small else (1, 32, 4096), clock)),
    ]
    # Attention and the small ops take seconds; experts get the remaining time.
    rows: list[Row] = []
    for name, make in parts[len(shapes) :] + parts[: len(shapes)]:
        rows += budget.spend(name, make(), keep)
        gc.collect()
        if not small:
            torch.cuda.empty_cache()
    return rows, clock


def time_models(budget: Budget, device: torch.device) -> list[dict[str, Any]]:
    """Both engines on each model, then the cost of batch invariance and of running without graphs."""
    small = device.type != "cuda"
    shapes = ("tiny",) if small else ("bench", "qwen3-30b-a3b-6-layers")
    runs = [(shape, engine) for shape in shapes for engine in ("ours", "transformers")]
    runs += [(shapes[0], engine) for engine in ENGINES[1:-1]]
    sizes = ["--batch", "2", "--prompt", "5", "--new-tokens", "3", "--repeats", "1"] if small else []
    found = []
    for shape, engine in runs:
        name = f"{shape} with {engine}"
        command = [sys.executable, "-m", "gpu_bench.model", engine, shape, "--device", device.type, *sizes]
        # The child finds this folder and the package by PYTHONPATH.
        path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)])
        try:
            child = subprocess.run(
                command,
                env=os.environ | {"PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=max(1.0, min(budget.left, 2 * MODEL_S)),
            )
        except subprocess.TimeoutExpired:
            budget.left_out.append(name)
            continue
        if child.returncode:
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            budget.left_out.append(f"{name} (failed: {last})")
            continue
        found.append(json.loads(child.stdout.strip().splitlines()[-1]))
    return found


def report(result: dict[str, Any], checks: list[Check], rows: list[Row], models: list[dict[str, Any]]) -> str:
    """The page: machine, checks, timings, models, and what is missing."""
    lines = [
        f"# {result['device']}",
        "",
        ", ".join(f"{name} {value}" for name, value in result["versions"].items()) + ".",
        f"Copy rate {result['bytes_per_s'] / 1e12:.2f} TB/s (read and write), "
        f"matrix rate {result['flops_per_s'] / 1e12:.1f} TFLOP/s in bfloat16.",
        "",
        f"{sum(check.passed for check in checks)} of {len(checks)} checks passed.",
        *(
            f"- FAILED {check.op}, {check.shape}, {check.dtype}: error {check.error:.3g}, allowed {check.allowed:.3g}"
            for check in checks
            if not check.passed
        ),
        "",
        "| what | shape | case | ours, us | others, us | best other / ours | bytes floor | FLOP floor | floor / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        others = ", ".join(f"{name} {'-' if us is None else f'{us:.1f}'}" for name, us in row.others_us.items())
        best = "-" if row.best_other is None else f"{row.best_other:.2f}"
        lines.append(
            f"| {row.what} | {row.shape} | {row.case} | {row.ours_us:.1f} | {others} | {best} | {row.bytes_us:.1f} | "
            f"{row.flops_us:.1f} | {row.floor_share:.0%} |"
        )
    lines += ["", "| model | engine | batch | prefill, tokens/s | decode, tokens/s | byte floor of decode, tokens/s |"]
    lines += ["|---|---|---|---|---|---|"]
    for model in models:
        floor = model["batch"] * result["bytes_per_s"] / model["decode_bytes"]
        lines.append(
            f"| {model['shape']} | {model['engine']} | {model['batch']} | {model['prefill_tokens_per_s']:.0f} | "
            f"{model['decode_tokens_per_s']:.0f} | {floor:.0f} |"
        )
    lines += ["", *(f"Left out: {name}." for name in result["left_out"])]
    return "\n".join(lines).rstrip() + "\n"


def draw(rows: list[Row], file: Path) -> None:
    """Share of the floor over tokens, a panel per shape of the expert MLP."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    experts = [row for row in rows if row.what == "experts"]
    shapes = list(dict.fromkeys(row.shape for row in experts))
    figure, axes = plt.subplots(1, max(1, len(shapes)), figsize=(4 * max(1, len(shapes)), 3.5), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=False):
        cases = [row for row in experts if row.shape == shape and row.case.endswith("balanced")]
        tokens = [int(row.case.split()[0]) for row in cases]
        floors = [max(row.bytes_us, row.flops_us) for row in cases]
        ways = {"ours": [row.ours_us for row in cases]}
        ways |= {name: [row.others_us[name] or float("nan") for row in cases] for name in cases[0].others_us}
        for name, times in ways.items():
            shares = [floor / us for floor, us in zip(floors, times, strict=True)]
            axis.plot(tokens, shares, marker="o", label=name, linewidth=2 if name == "ours" else 1)
        axis.set(xscale="log", xlabel="tokens", title=shape, ylim=(0, 1.1))
    axes[0][0].set_ylabel("share of the floor (balanced)")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def versions() -> dict[str, str]:
    """Versions of the software that the results depend on."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers"):
        if importlib.util.find_spec(name):
            found[name] = str(__import__(name).__version__)
    return found


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu"), help="folder of the results")
    parser.add_argument("--cpu", action="store_true", help="check this script without a GPU")
    parser.add_argument("--no-models", action="store_true", help="leave the whole models out")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no GPU is here; --cpu checks this script without one")
    device = torch.device("cpu" if args.cpu else "cuda")
    budget = Budget(BUDGET_S)
    torch.manual_seed(0)
    with torch.inference_mode():
        checks = check_all(SMALL_SHAPES[1:], device, torch.float32)
        if not args.cpu:
            checks += check_all(SMALL_SHAPES, device, torch.bfloat16)
        rows, clock = time_ops(budget, device, keep=0.0 if args.no_models else 4 * MODEL_S if not args.cpu else 60.0)
    models = [] if args.no_models else time_models(budget, device)
    result: dict[str, Any] = {
        "device": "CPU: a check of the script, no measurement" if args.cpu else torch.cuda.get_device_name(device),
        "versions": versions(),
        "implementations": ops.describe(device),
        "bytes_per_s": clock.bytes_per_s,
        "flops_per_s": clock.flops_per_s,
        "left_out": budget.left_out,
        "checks": [asdict(check) for check in checks],
        "rows": [asdict(row) for row in rows],
        "models": models,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib"):
        draw(rows, args.out / "bench_gpu.png")
    else:
        budget.left_out.append("the plot (matplotlib is not installed)")
    page = report(result, checks, rows, models)
    (args.out / "bench_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "bench_gpu.md").write_text(page)
    print(page, end="")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
