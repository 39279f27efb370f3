"""Predict DeepSeek-V3's decoding and prompts on H800 nodes, and compare with published figures.

There are three ways of sending rows on the same hardware. One is this runtime's. For decoding, DeepEP's low-latency
kernels send each row to its expert's rank without deduplication, and two half batches take turns. For prompts, DeepEP's
normal kernels send a row once to each node, which forwards it over NVLink; two half batches take turns as well. Writes
a table and JSON to benchmarks/planner.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from moe_runtime.planner.choices import Choice, evaluate
from moe_runtime.planner.hardware import Hardware
from moe_runtime.planner.hardware_file import load_hardware
from moe_runtime.planner.predict import Phase
from moe_runtime.planner.report import to_dict
from moe_runtime.planner.routing import LoadRouting
from moe_runtime.planner.shape import ModelShape

FOLDER = Path(__file__).parent.parent / "benchmarks" / "planner"
GPUS_PER_NODE = 8
DECODE_KEYS, DECODE_BATCHES = 4989, (32, 88, 128)
PROMPT, PROMPTS_PER_RANK = 4096, (4,)


def ways(phase: Phase) -> dict[str, Hardware]:
    """The hardware with each way of sending."""
    h800 = load_hardware("h800")
    rule = "expert" if phase == "decode" else "node"
    return {"this runtime": h800, "DeepEP": replace(h800, overlap=2, rows_out=rule, rows_back=rule)}


def row(phase: str, way: str, choice: Choice) -> str:
    """A line of the table, in Markdown."""
    found, parts = choice.prediction, choice.prediction.parts
    shown = ("attention", "kv", "dense", "experts", "exchange", "head", "overhead")
    cells = [phase, way, str(choice.ranks), str(choice.batch), f"{found.balancedness:.2f}"]
    cells += [f"{parts[name] * 1e3:.1f}" for name in shown]
    cells += [f"{found.step_seconds * 1e3:.1f}", f"{choice.tokens_per_second_rank * GPUS_PER_NODE / 1e3:.1f}"]
    cells += [f"{found.rank_memory.total / 1e9:.0f}{'' if found.fits else ' (too much)'}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shape = ModelShape.load(FOLDER / "deepseek-v3.json")
    routing = LoadRouting.assume("uniform", shape.num_experts, shape.top_k)
    head = "phase | way | ranks | batch | balanced | attention | kv | dense | experts | exchange | head | overhead"
    lines = [f"| {head} | step, ms | 1000 tok/s a node | GB a rank |", "|" + "---|" * 15]
    plans = []
    cases: list[tuple[Phase, int, tuple[int, ...], int, tuple[int, ...]]] = [
        ("decode", DECODE_KEYS, (144, 320), 0, DECODE_BATCHES),
        ("prefill", PROMPT, (32,), 1, PROMPTS_PER_RANK),
        ("prefill", PROMPT, (320,), 0, PROMPTS_PER_RANK),
    ]
    for phase, length, ranks, redundant, batches in cases:
        for way, hardware in ways(phase).items():
            choices = list(
                evaluate(
                    shape,
                    hardware,
                    routing,
                    ranks=ranks,
                    redundant=[redundant],
                    batches=batches,
                    phase=phase,
                    length=length,
                )
            )
            lines += [row(phase, way, choice) for choice in choices]
            plans.append({"way": way} | to_dict(shape, hardware, "uniform", phase, length, choices, None))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "deepseek-v3-plan.md").write_text("\n".join(lines) + "\n")
    (FOLDER / "deepseek-v3-plan.json").write_text(json.dumps(plans, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
