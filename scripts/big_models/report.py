"""The report of a model's runs: a Markdown table and a plot, from the result of `Runs.run`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from peers.report import COLOURS, OURS, cases_of, gain_over, select

PHASES = ("decode", "prefill")


def markdown(results: dict[str, Any]) -> str:
    """The machine, speeds, memory and the checks."""
    config, machine = results["config"], results["machine"]
    versions = ", ".join(f"{name} {info['version']}" for name, info in results["info"].items())
    parts = [
        f"`{results['model']}`: {results['file_bytes'] / 1e9:.1f} GB, {config['num_hidden_layers']} layers, random "
        f"weights. {machine['date']}, {machine['cpu']}, {results['threads']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}. Repetitions: {results['repetitions']}. {versions}."
    ]
    if absent := results["absent"]:
        parts.append("Left out: " + "; ".join(f"{engine} ({why})" for engine, why in absent.items()) + ".")
    parts += ["### Speed", _speeds(results)]
    if results["memory"]:
        parts += ["### Memory", _memory(results)]
    parts += ["### Checks", _checks(results)]
    return "\n\n".join(parts) + "\n"


def _speeds(results: dict[str, Any]) -> str:
    """A row per case and engine. A ratio is the median of the ratios within repetitions."""
    rows = [
        "| phase | prompts x tokens | engine | tok/s, median (lowest to highest) | ours / it |",
        "|---|---|---|---|---|",
    ]
    has_ours = any(sample["engine"] == OURS for sample in results["samples"])
    for phase in PHASES:
        for case in cases_of(results, phase):
            for engine in results["engines"]:
                speeds = [sample["tokens_per_s"] for sample in select(results, phase, case, engine)]
                if not speeds:
                    continue
                gain = f"{gain_over(results, phase, case, engine):.2f}" if has_ours and engine != OURS else ""
                spread = f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})"
                rows.append(f"| {phase} | {case} | {engine} | {spread} | {gain} |")
    return "\n".join(rows)


def _memory(results: dict[str, Any]) -> str:
    """A row per engine and rank, with the highest figures of its runs."""
    rows = [
        "| engine | rank | planned, GB | loaded, GB | after the run, GB | peak, GB | most / planned | loaded in, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in results["memory"]:
        found.setdefault((entry["engine"], entry["rank"]), []).append(entry)
    for (engine, rank), entries in found.items():
        sizes = (max(entry[key] for entry in entries) / 1e9 for key in ("planned", "loaded", "after", "peak"))
        seconds = [f"{load['seconds']:.0f}" for load in results["loads"] if load["engine"] == engine]
        cells = [engine, str(rank), *(f"{size:.2f}" for size in sizes)]
        ratio = max(entry["ratio"] for entry in entries)
        rows.append(f"| {' | '.join(cells)} | {ratio:.3f} | {', '.join(seconds)} |")
    return "\n".join(rows)


def _checks(results: dict[str, Any]) -> str:
    lines = []
    if results["experts_used"] is not None:
        config = results["config"]
        experts = config.get("num_experts") or config["num_local_experts"]
        lines.append(f"A prompt of 512 tokens uses {results['experts_used']:.1f} of {experts} experts in a layer.")
    for engine, difference in results["differences"].items():
        lines.append(
            f"The log-probabilities of a prompt's tokens in {engine} differ from those in {results['engines'][0]} by "
            f"{difference:.3f} (root mean square)."
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of all engines, with the spread over repetitions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(phase, case) for phase in PHASES for case in cases_of(results, phase)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels), 4.2), squeeze=False)
    for axis, (phase, case) in zip(axes[0], panels, strict=True):
        names = [engine for engine in results["engines"] if select(results, phase, case, engine)]
        for place, engine in enumerate(names):
            speeds = [sample["tokens_per_s"] for sample in select(results, phase, case, engine)]
            middle = statistics.median(speeds)
            axis.bar(place, middle, color=COLOURS[engine], width=0.7)
            axis.errorbar(place, middle, [[middle - min(speeds)], [max(speeds) - middle]], color="#333333", capsize=3)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
        axis.set_title(f"{phase}, {case}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens/s")
    figure.suptitle(f"{results['model']}, {results['machine']['cpu']}, {results['threads']} cores", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
