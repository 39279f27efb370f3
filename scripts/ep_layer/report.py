"""Results of the comparison as lines, a table and a plot."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Result:
    """Medians in microseconds; `faster` and `of_floor` are medians of ratios, by dispatcher."""

    shape: str
    routing: str
    ranks: int
    tokens_per_rank: int
    floor_us: float
    deepspeed_us: float
    ours_us: dict[str, float]
    faster: dict[str, float]
    of_floor: dict[str, float]

    @property
    def best(self) -> str:
        """The fastest dispatcher."""
        return min(self.ours_us, key=lambda name: self.ours_us[name])


def line(result: Result) -> str:
    """A row of the table."""
    ours = ", ".join(f"{name} {us:.0f}" for name, us in sorted(result.ours_us.items(), key=lambda item: item[1]))
    cells = (
        result.shape,
        str(result.ranks),
        result.routing,
        str(result.tokens_per_rank),
        f"{result.floor_us:.0f}",
        f"{result.deepspeed_us:.0f}",
        ours,
        f"{result.faster[result.best]:.1f}",
        f"{result.of_floor[result.best]:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def table(results: list[Result]) -> str:
    """All results in Markdown; the last two columns are for the fastest dispatcher."""
    head = (
        "layer",
        "ranks",
        "routing",
        "tokens a rank",
        "floor us",
        "DeepSpeed us",
        "ours us",
        "times faster",
        "of floor",
    )
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(line, results)]) + "\n"


def machine(instruction_set: str) -> dict[str, object]:
    """The machine that the figures come from."""
    return {
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "instruction_set": instruction_set,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }


def draw(results: list[Result], file: Path) -> None:
    """Time over tokens, a panel for every layer, routing and number of ranks."""
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys((r.shape, r.routing) for r in results))
    columns = list(dict.fromkeys(r.ranks for r in results))
    figure = Figure(figsize=(4.6 * len(columns), 3.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharey="row")
    colors = {"local": "C0", "all_gather": "C2", "all_to_all": "C4", "symmetric": "C0"}
    for (shape, routing), line_of_axes in zip(rows, axes, strict=True):
        for ranks, ax in zip(columns, line_of_axes, strict=True):
            found = [r for r in results if (r.shape, r.routing, r.ranks) == (shape, routing, ranks)]
            tokens = [r.tokens_per_rank for r in found]
            ax.plot(tokens, [r.deepspeed_us / 1e3 for r in found], "o-", color="C3", label="DeepSpeed")
            for name in found[0].ours_us if found else ():
                ax.plot(tokens, [r.ours_us[name] / 1e3 for r in found], "o-", color=colors[name], label=name)
            ax.plot(tokens, [r.floor_us / 1e3 for r in found], "--", color="0.5", label="floor")
            ax.set(xscale="log", yscale="log", title=f"{shape}\n{ranks} rank(s), {routing}")
            ax.title.set_fontsize(8)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("tokens a rank")
    for ax in axes[:, 0]:
        ax.set_ylabel("milliseconds")
    figure.savefig(file, dpi=110)
