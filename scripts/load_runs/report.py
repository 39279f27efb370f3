"""The result of a load test: a table, the raw figures, a plot, and what is wrong."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from load_runs.run import Run

MOST_GROWTH = 0.01  # of the memory, from the third quarter of a run to the last
LEAST_MEMORY_SECONDS = 240.0  # a shorter run says nothing about growth
LEAST_OF_OFFLINE = 0.9
MOST_OF_RANKS = 0.1  # CPU time of the front
COLOURS = ("#3b528b", "#21918c", "#e07b39")


@dataclass(frozen=True)
class Limits:
    """A good stream has its first token within `ttft` seconds, and takes at most `tpot` seconds a token after it."""

    ttft: float
    tpot: float


@dataclass(frozen=True)
class Result:
    """A run and its figures.

    Attributes:
        offline: tokens per second of the engine without a server, with as many requests; None if not measured.
    """

    run: Run
    limits: Limits
    offline: float | None = None

    def figures(self) -> dict[str, Any]:
        run, counted = self.run, self.run.counted
        good = [s for s in counted if s.ttft <= self.limits.ttft and s.tpot <= self.limits.tpot]
        return {
            "run": run.name,
            "seconds": round(run.end - run.start, 1),
            "streams": len(run.streams),
            "faults": dict(Counter(run.faults)),
            "tokens_per_second": round(run.tokens_per_second, 1),
            "offline_tokens_per_second": None if self.offline is None else round(self.offline, 1),
            "ttft": _percentiles([stream.ttft for stream in counted]),
            "tpot": _percentiles([stream.tpot for stream in counted]),
            "good_share": round(len(good) / max(1, len(counted)), 3),
            "good_per_second": round(len(good) / (run.end - run.counted_from), 3),
            "front_cpu_share": round(run.front_cpu / run.ranks_cpu, 4),
            "memory_growth": round(run.growth, 4),
            "memory_bytes": [[round(moment - run.start, 1), size] for moment, size in run.memory],
            "used_pages": run.used_pages,
        }

    def mistakes(self) -> list[str]:
        """What must not be, in words."""
        run, found = self.run, []
        if run.faults:
            found.append(
                f"{len(run.faults)} of {len(run.streams)} streams are wrong: {Counter(run.faults).most_common(3)}"
            )
        if run.used_pages:
            found.append(f"{run.used_pages} pages are not free at the end")
        if run.end - run.start >= LEAST_MEMORY_SECONDS and run.growth > MOST_GROWTH:
            found.append(f"memory has grown by {run.growth:.1%}")
        if self.offline is not None and run.tokens_per_second < LEAST_OF_OFFLINE * self.offline:
            found.append(f"{run.tokens_per_second / self.offline:.2f} of the speed offline")
        if run.front_cpu > MOST_OF_RANKS * run.ranks_cpu:
            found.append(f"the front takes {run.front_cpu / run.ranks_cpu:.3f} of the CPU time of the ranks")
        return [f"{run.name}: {text}" for text in found]


def write(folder: Path, title: str, results: Sequence[Result]) -> None:
    """Write `load.md`, `load.json` and `load.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = [result.figures() for result in results]
    (folder / "load.md").write_text(f"{title}\n\n{table(results)}\n")
    (folder / "load.json").write_text(json.dumps({"title": title, "runs": figures}, indent=1) + "\n")
    _draw(folder / "load.png", title, figures)


def table(results: Sequence[Result]) -> str:
    limits = results[0].limits
    lines = [
        "| run | s | streams | wrong | tokens/s | of offline | first token, s (p50, p90, p99) "
        f"| ms per token (p50, p90, p99) | good: {limits.ttft:g} s, {1000 * limits.tpot:g} ms "
        "| front / ranks, CPU | memory | pages held |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        f = result.figures()
        offline = "-" if result.offline is None else f"{f['tokens_per_second'] / result.offline:.2f}"
        ttft = ", ".join(f"{value:.2f}" for value in f["ttft"].values())
        tpot = ", ".join(f"{1000 * value:.0f}" for value in f["tpot"].values())
        lines.append(
            f"| {f['run']} | {f['seconds']:.0f} | {f['streams']} | {sum(f['faults'].values())} "
            f"| {f['tokens_per_second']:.0f} | {offline} | {ttft} | {tpot} "
            f"| {f['good_share']:.0%}, {f['good_per_second']:.2f}/s | {f['front_cpu_share']:.3f} "
            f"| {f['memory_growth']:+.2%} | {f['used_pages']} |"
        )
    return "\n".join(lines)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(("p50", "p90", "p99"), round(values[0], 4) if values else 0.0)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{percent}": round(cuts[percent - 1], 4) for percent in (50, 90, 99)}


def _draw(path: Path, title: str, figures: Sequence[dict[str, Any]]) -> None:
    figure = Figure(figsize=(11.0, 6.4), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=8.5)
    (first, token), (speed, memory) = figure.subplots(2, 2)
    names = [f["run"] for f in figures]
    places = range(len(names))
    for axes, key, factor, label in (
        (first, "ttft", 1, "time to first token, s"),
        (token, "tpot", 1000, "ms per token"),
    ):
        for percentile, colour in zip(("p50", "p90", "p99"), COLOURS, strict=True):
            axes.plot(places, [factor * f[key][percentile] for f in figures], "o-", color=colour, label=percentile)
        axes.set_title(label, fontsize=9)
        axes.legend(fontsize=7)
    speed.bar(places, [f["tokens_per_second"] for f in figures], color=COLOURS[0], label="served")
    offline = [(place, f["offline_tokens_per_second"]) for place, f in enumerate(figures)]
    points = [(place, value) for place, value in offline if value is not None]
    if points:
        speed.plot(*zip(*points, strict=True), "_", color="black", markersize=22, label="offline")
    speed.set_title("tokens per second", fontsize=9)
    speed.legend(fontsize=7)
    for f in figures:
        memory.plot(*zip(*[(t, size / 1e9) for t, size in f["memory_bytes"]], strict=True), label=f["run"])
    memory.set_title("memory of all processes, GB (PSS) over seconds", fontsize=9)
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=7)
    for axes in (first, token, speed):
        axes.set_xticks(places, names, fontsize=7, rotation=15)
        axes.set_ylim(bottom=0)
    for axes in (first, token, speed, memory):
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
