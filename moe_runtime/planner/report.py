"""The choices as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_runtime.planner.choices import Choice
from moe_runtime.planner.hardware import Hardware
from moe_runtime.planner.hardware_file import hardware_to_dict
from moe_runtime.planner.shape import ModelShape

HEADER = (
    "weights",
    "ranks",
    "redundant",
    "batch/rank",
    "balanced",
    "step ms",
    "tok/s",
    "tok/s/rank",
    "GB/rank",
    "fits",
    "most of it",
)


def to_dict(
    shape: ModelShape,
    hardware: Hardware,
    routing: str,
    phase: str,
    length: int,
    choices: Sequence[Choice],
    best: Choice | None,
) -> dict[str, Any]:
    """All figures, as JSON can hold them: seconds and bytes.

    Args:
        routing: the source of the tokens' experts, in words.
        best: the recommendation; None if no choice is allowed.
    """
    return {
        "model": shape.name,
        "hardware": hardware_to_dict(hardware),
        "routing": routing,
        "phase": phase,
        "context_len": length,
        "choices": [_entry(choice) for choice in choices],
        "recommended": None if best is None else _entry(best),
    }


def _entry(choice: Choice) -> dict[str, Any]:
    found, memory = choice.prediction, choice.prediction.rank_memory
    return {
        "weights": choice.weights,
        "ranks": choice.ranks,
        "redundant": choice.redundant,
        "batch": choice.batch,
        "balancedness": found.balancedness,
        "step_seconds": found.step_seconds,
        "parts_seconds": found.parts,
        "busy_seconds": found.busy_seconds,
        "tokens_per_second": found.tokens_per_second,
        "tokens_per_second_rank": choice.tokens_per_second_rank,
        "rank_bytes": memory.total,
        "memory_bytes": vars(memory),
        "fits": found.fits,
    }


def to_text(found: dict[str, Any]) -> str:
    """The figures of `to_dict` as text."""
    rows = [HEADER, *(_row(entry) for entry in found["choices"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    keys = "keys per sequence" if found["phase"] == "decode" else "tokens per prompt"
    best = found["recommended"]
    if best is None:
        advice = "None of these fits and is fast enough."
    else:
        advice = (
            f"Recommended: {best['weights']}, {best['ranks']} ranks, {best['redundant']} redundant slots, "
            f"{best['batch']} sequences each: "
            f"{best['tokens_per_second_rank']:.0f} tokens/s a rank, {best['step_seconds'] * 1e3:.1f} ms a step"
        )
    return "\n".join(
        [
            f"{found['model']} on {found['hardware']['name']}, {found['phase']} with {found['context_len']} {keys}; "
            f"routing: {found['routing']}",
            "",
            *table,
            "",
            advice,
        ]
    )


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    parts, step = entry["parts_seconds"], entry["step_seconds"]
    most = sorted(parts, key=parts.__getitem__, reverse=True)[:2]
    return (
        entry["weights"],
        str(entry["ranks"]),
        str(entry["redundant"]),
        str(entry["batch"]),
        f"{entry['balancedness']:.2f}",
        f"{step * 1e3:.2f}",
        f"{entry['tokens_per_second']:.0f}",
        f"{entry['tokens_per_second_rank']:.0f}",
        f"{entry['rank_bytes'] / 1e9:.1f}",
        "yes" if entry["fits"] else "no",
        ", ".join(f"{name} {parts[name] / step:.0%}" for name in most),
    )
