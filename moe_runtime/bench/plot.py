"""Plots a measurement: latencies and throughput over the request rate."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from moe_runtime.bench.report import Report, summarize
from moe_runtime.bench.workload import rate_name

COLOURS = {"p50": "#3b528b", "p90": "#21918c", "p99": "#e07b39"}
BAR, TEXT, MUTED, FAILED = "#3b528b", "#222222", "#666666", "#c0392b"
LOG_RATIO = 20.0  # an axis is logarithmic if the ratio of its values is larger
SIZE, DPI = (11.0, 3.9), 150


def draw(report: Report) -> bytes:
    """A PNG with three panels: time to first token, time per output token, output throughput."""
    runs = sorted(report.runs, key=lambda run: run.request_rate)
    results = [summarize(run) for run in runs]
    names = [rate_name(run.request_rate) for run in runs]
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    figure.suptitle(textwrap.fill(report.title, 120), fontsize=9.5, color=TEXT)
    first, second, third = figure.subplots(1, 3)
    _draw_latency(first, "Time to first token (TTFT)", "ttft", results)
    _draw_latency(second, "Time per output token (TPOT)", "tpot", results)
    _draw_throughput(third, results)
    for axes in (first, second, third):
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel("request rate (req/s)", fontsize=8, color=MUTED)
        axes.tick_params(labelsize=8, colors=MUTED)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_latency(axes: Axes, title: str, latency: str, results: Sequence[dict[str, Any]]) -> None:
    """Draw a line per percentile. A rate at which no request completed has no point."""
    axes.set_title(f"{title}, ms", fontsize=9, color=TEXT)
    found = []
    for name, colour in COLOURS.items():
        values = [result[f"{name}_{latency}_ms"] for result in results]
        points = [(x, value) for x, value in enumerate(values) if value is not None]
        found += [value for _, value in points]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.5, label=name)
    if not found:
        axes.text(0.5, 0.5, "nothing completed", transform=axes.transAxes, ha="center", fontsize=8, color=FAILED)
        return
    if max(found) > LOG_RATIO * min(found) > 0:
        axes.set_yscale("log")
        axes.set_ylim(10 ** math.floor(math.log10(min(found))), 10 ** math.ceil(math.log10(max(found))))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.15 * max(found))
    axes.legend(fontsize=8, frameon=False, labelcolor=MUTED)


def _draw_throughput(axes: Axes, results: Sequence[dict[str, Any]]) -> None:
    """Draw a bar per rate, with its value and the number of failed requests."""
    axes.set_title("Output throughput, tok/s", fontsize=9, color=TEXT)
    values = [result["output_throughput"] for result in results]
    bars = axes.bar(range(len(values)), values, width=0.6, color=BAR)
    axes.bar_label(
        bars, [f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in values], fontsize=8, padding=2
    )
    axes.set_ylim(0, 1.15 * max(max(values), 1e-9))
    for x, result in enumerate(results):
        if result["failed"]:
            text = f"{result['failed']} failed"
            axes.text(
                x,
                0.03,
                text,
                transform=axes.get_xaxis_transform(),
                ha="center",
                fontsize=8,
                color=FAILED,
                bbox={"fc": "white", "ec": "none", "pad": 1},
            )
