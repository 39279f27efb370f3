"""The picture of a plan: throughput per rank over a step's time, the parts of a step, and memory."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEXT, MUTED, LIMIT = "#222222", "#666666", "#c0392b"
PARTS = {
    "attention": "#3b528b",
    "kv": "#5f7fbf",
    "dense": "#8fb3d9",
    "experts": "#21918c",
    "exchange": "#e07b39",
    "head": "#b8b8b8",
    "overhead": "#777777",
}
MEMORY = {"dense": "#3b528b", "experts": "#21918c", "kv_cache": "#8fb3d9", "reserved": "#b8b8b8"}
SIZE, DPI = (13.0, 4.8), 150


def draw(found: Mapping[str, Any]) -> bytes:
    """A PNG of the result of `report.to_dict`."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    title = (
        f"{found['model']} on {found['hardware']['name']}, {found['phase']}, {found['context_len']} tokens of context"
    )
    figure.suptitle(textwrap.fill(f"{title}; routing: {found['routing']}", 120), fontsize=9.5, color=TEXT)
    frontier, parts, memory = figure.subplots(1, 3)
    shown = found["recommended"] or found["choices"][0]
    at_batch = [entry for entry in found["choices"] if entry["batch"] == shown["batch"]]
    _draw_frontier(frontier, found["choices"], found["recommended"])
    _draw_stack(parts, at_batch, "parts_seconds", PARTS, 1e3, f"A step, ms, {shown['batch']} sequences a rank")
    _draw_stack(memory, at_batch, "memory_bytes", MEMORY, 1e-9, "Memory of a rank, GB")
    hardware = found["hardware"]
    if hardware["cores"] is None:
        limit = hardware["memory_bytes"]["value"] / 1e9
        memory.axhline(limit, color=LIMIT, linewidth=1, label="there is")
        memory.set_ylim(top=max(memory.get_ylim()[1], 1.1 * limit))
    for axes in (frontier, parts, memory):
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4)
        axes.tick_params(labelsize=7.5, colors=MUTED)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_frontier(axes: Axes, choices: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> None:
    axes.set_title("Tokens/s of a rank over the time of a step", fontsize=9, color=TEXT)
    groups = sorted({(entry["ranks"], entry["redundant"]) for entry in choices})
    colours = colormaps["viridis"].resampled(max(len(groups), 2))
    for number, (ranks, redundant) in enumerate(groups):
        line = [entry for entry in choices if (entry["ranks"], entry["redundant"]) == (ranks, redundant)]
        axes.plot(
            [entry["step_seconds"] * 1e3 for entry in line],
            [entry["tokens_per_second_rank"] for entry in line],
            color=colours(number),
            marker="o",
            markersize=3.5,
            linewidth=1.3,
            label=f"{ranks} ranks, +{redundant}",
        )
    if best is not None:
        point = (best["step_seconds"] * 1e3, best["tokens_per_second_rank"])
        axes.plot(*point, marker="o", markersize=10, markerfacecolor="none", markeredgecolor=LIMIT, linestyle="none")
    axes.set_xlabel("step, ms", fontsize=8, color=MUTED)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _draw_stack(
    axes: Axes,
    entries: Sequence[Mapping[str, Any]],
    key: str,
    colours: Mapping[str, str],
    unit: float,
    title: str,
) -> None:
    axes.set_title(title, fontsize=9, color=TEXT)
    bottom = [0.0] * len(entries)
    for name, colour in colours.items():
        values = [entry[key][name] * unit for entry in entries]
        axes.bar(range(len(entries)), values, bottom=bottom, color=colour, width=0.7, label=name.replace("_", " "))
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    names = [f"{entry['ranks']}\n+{entry['redundant']}" for entry in entries]
    axes.set_xticks(range(len(entries)), names)
    axes.set_xlabel("ranks, redundant slots", fontsize=8, color=MUTED)
