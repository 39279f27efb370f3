"""The report of a run: a Markdown table and a plot from the result of `Conductor.run`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = "ours"
PHASES = ("decode", "prefill")
LLAMA_CPP = {"int8": "Q8_0", "int4": "Q4_0"}
COLOURS = {
    "ours": "#d1495b",
    "ours-int8-rows": "#f79256",
    "ours-bf16": "#c9a0a6",
    "ours-ep2": "#edae49",
    "llama.cpp": "#00798c",
    "vllm": "#30638e",
    "transformers": "#8d96a3",
}


def markdown(results: dict[str, Any]) -> str:
    """The machine, the check and a table per phase."""
    parts = [_machine(results), f"Model: `{results['shape']}` of `scripts/make_bench_model.py`, bfloat16."]
    if quantization := results.get("quantization"):
        parts.append(
            f"Experts, attention and head are quantised: {quantization}, in llama.cpp {LLAMA_CPP[quantization]}. "
            "ours-int8-rows multiplies with rows in int8, as llama.cpp does. ours-bf16 is not quantised."
        )
    if results.get("avx2"):
        parts.append("No engine uses instructions beyond AVX2.")
    if absent := results.get("absent"):
        parts.append("Not run: " + "; ".join(f"{engine} ({why})" for engine, why in absent.items()) + ".")
    if results["agreement"]:
        parts += ["### Same weights", agreement_table(results["agreement"])]
    for phase in PHASES:
        if table := phase_table(results, phase):
            parts += [f"### {phase.capitalize()}", table]
    return "\n\n".join(parts) + "\n"


def phase_table(results: dict[str, Any], phase: str) -> str:
    """A row per case and engine; empty if nothing was measured.

    Ratios are medians of ratios: an engine to the floor measured with it, and ours to the engine in the same
    repetition.
    """
    rows = [
        "| prompts x tokens | engine | tok/s, median (lowest to highest) | floor, tok/s | of the floor | ours / it |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases_of(results, phase):
        for engine in results["engines"]:
            samples = select(results, phase, case, engine)
            if not samples:
                continue
            speeds, of_floor = ([s[key] for s in samples] for key in ("tokens_per_s", "of_floor"))
            gain = "" if engine == OURS else _number(gain_over(results, phase, case, engine))
            rows.append(
                f"| {case} | {engine} | {_number(statistics.median(speeds))} "
                f"({_number(min(speeds))} to {_number(max(speeds))}) "
                f"| {_number(statistics.median(s['floor_tokens_per_s'] for s in samples))} "
                f"| {statistics.median(of_floor):.2f} ({min(of_floor):.2f} to {max(of_floor):.2f}) | {gain} |"
            )
    return "\n".join(rows) if len(rows) > 2 else ""


def gain_over(results: dict[str, Any], phase: str, case: str, engine: str) -> float:
    """Median over repetitions of our speed over another engine's in the same repetition."""
    ours, theirs = (
        {s["repetition"]: s["tokens_per_s"] for s in select(results, phase, case, name)} for name in (OURS, engine)
    )
    return statistics.median(ours[repetition] / theirs[repetition] for repetition in theirs)


def agreement_table(agreement: dict[str, Any]) -> str:
    """Agreement of every engine with the float32 reference."""
    rows = [
        "| engine | mean KL to float32 | highest KL | root mean square error of log-probabilities | agrees |",
        "|---|---|---|---|---|",
    ]
    for engine, found in agreement.items():
        rows.append(
            f"| {engine} | {found['mean_kl']:.5f} | {found['max_kl']:.5f} | {found['rms_logprob']:.4f} "
            f"| {'yes' if found['agrees'] else 'NO'} |"
        )
    return "\n".join(rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of all engines with their spread; above each bar, a line at the floor measured with it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(phase, case) for phase in PHASES for case in cases_of(results, phase)]
    columns = max(sum(phase == which for phase, _ in panels) for which in PHASES)
    figure, axes = pyplot.subplots(len(PHASES), columns, figsize=(3.2 * columns, 7.5), squeeze=False)
    for row, phase in enumerate(PHASES):
        cases = cases_of(results, phase)
        for column, axis in enumerate(axes[row]):
            if column >= len(cases):
                axis.set_visible(False)
                continue
            _panel(axis, results, phase, cases[column])
        axes[row][0].set_ylabel(f"{phase}, tokens/s")
    handles = [pyplot.Line2D([], [], color="black", linewidth=2, label="floor")]
    figure.legend(handles=handles, loc="upper right")
    cores = f"{results['threads']} cores{', AVX2 alone' if results.get('avx2') else ''}"
    weights = results.get("quantization") or "bfloat16"
    figure.suptitle(f"{results['shape']} model, {weights}, {results['machine']['cpu']}, {cores}")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Any, results: dict[str, Any], phase: str, case: str) -> None:
    names = [engine for engine in results["engines"] if select(results, phase, case, engine)]
    for place, engine in enumerate(names):
        samples = select(results, phase, case, engine)
        speeds = [s["tokens_per_s"] for s in samples]
        middle = statistics.median(speeds)
        axis.bar(place, middle, color=COLOURS[engine], width=0.7)
        axis.errorbar(place, middle, [[middle - min(speeds)], [max(speeds) - middle]], color="#333333", capsize=3)
        floor = statistics.median(s["floor_tokens_per_s"] for s in samples)
        axis.hlines(floor, place - 0.45, place + 0.45, color="black", linewidth=2)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axis.set_title(f"{case} prompt tokens", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def cases_of(results: dict[str, Any], phase: str) -> list[str]:
    """Names of the cases that have samples of a phase, in the order measured."""
    return list(dict.fromkeys(s["case"] for s in results["samples"] if s["phase"] == phase))


def select(results: dict[str, Any], phase: str, case: str, engine: str) -> list[dict[str, Any]]:
    """The samples of one engine and case."""
    wanted = {"phase": phase, "case": case, "engine": engine}
    return [s for s in results["samples"] if wanted.items() <= s.items()]


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    bandwidth, product = (_spread(results["samples"], key) for key in ("bytes_per_s_all", "flops_per_s_all"))
    versions = ", ".join(f"{name} {info['version']}" for name, info in results["info"].items())
    return (
        f"{machine['date']}, {machine['cpu']}, {results['threads']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}. All cores read {bandwidth} GB/s and multiply at {product} GFLOP/s "
        f"(medians and ranges over the run). {results['repetitions']} repetitions. {versions}."
    )


def _spread(samples: Iterable[dict[str, Any]], key: str) -> str:
    values = sorted(s["rates"][key] / 1e9 for s in samples)
    return f"{statistics.median(values):.0f} ({values[0]:.0f} to {values[-1]:.0f})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
