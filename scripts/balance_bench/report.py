"""The samples of a run, and the table and picture of several runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS, OUTPUT_TOKENS = 256, 4
NEARLY_EVEN = 1.1  # max/mean rows over ranks; the table shows how long it took to reach it


@dataclass(frozen=True)
class Sample:
    """One step: its end, the tokens since the previous step, the time spent waiting for it, and whether experts moved.

    Every few steps it also has figures since the last such step. `rows` are those of each layer's busiest rank, of the
    next busiest, and so on, summed over layers; `busy` are the CPU seconds of each rank.
    """

    at: float
    tokens: int
    seconds: float
    is_moving: bool
    rows: list[float] | None = None
    busy: list[float] | None = None


@dataclass(frozen=True)
class Run:
    """The samples of both kinds of traffic, `seconds` of each, and the balancer's decisions."""

    seconds: float
    samples: list[Sample]
    decisions: list[dict[str, Any]]

    @classmethod
    def from_dict(cls, run: dict[str, Any]) -> Run:
        return cls(run["seconds"], [Sample(**sample) for sample in run["samples"]], run["decisions"])

    def part(self, begin: float, end: float | None = None) -> list[tuple[float, Sample]]:
        """Steps that ended between two times (1 is the length of one traffic), with the seconds since the last step."""
        begin, end = begin * self.seconds, (begin + 1 if end is None else end) * self.seconds
        seconds = np.diff([0.0] + [sample.at for sample in self.samples]).tolist()
        steps = zip(seconds, self.samples, strict=True)
        return [(since, sample) for since, sample in steps if begin <= sample.at < end]


def table_of(ways: dict[str, list[Run]], setting: dict[str, Any]) -> str:
    lines = [
        f"{setting['model']}, {setting['ep_size']} ranks on {setting['cores']} cores, {setting['redundant_experts']} "
        f"redundant experts a rank. Prompts of {PROMPT_TOKENS} tokens with {OUTPUT_TOKENS} new ones, "
        f"{setting['chunk']} tokens of a rank in a step, {setting['seconds']:g} s of each traffic. Tokens per second "
        "of the whole traffic, and of its last third, as are rows and busy time; off is steady, and taken whole. p99 "
        "of steps in which no experts moved, and in which some did. Even: the first time that the rows' max/mean was "
        f"at most {NEARLY_EVEN}.",
        "",
        "| traffic | balance | tokens/s | to off | in the last third | to off | rows, max/mean | busy time, max/mean "
        "| even after, s | p99 step, ms | when moving |",
        "|---|" + "---|" * 10,
    ]
    for kind, name in enumerate(("first", "shifted")):
        base = 0.0
        for way, runs in ways.items():
            of_traffic = [run.part(kind) for run in runs]
            late = [step for run in runs for step in run.part(kind + 2 / 3, kind + 1)]
            rates = [rate([step for steps in of_traffic for step in steps]), rate(late)]
            if way == "off":  # `off` is steady, so its whole run is the best measure for any time
                base, rates = rates[0], [rates[0]] * 2
            cells = []
            for value in rates:
                cells += [f"{value:.0f}" if value else "", f"{value / base:.2f}" if value and base else ""]
            cells += [
                f"{max_over_mean([getattr(s, of) for _, s in late]):.2f}" if late else "" for of in ("rows", "busy")
            ]
            cells.append(even_after(runs[0], kind))
            for is_moving in (False, True):
                cells.append(p99([s.seconds for steps in of_traffic for _, s in steps if s.is_moving == is_moving]))
            lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rate(steps: list[tuple[float, Sample]]) -> float:
    """Tokens per second."""
    return sum(sample.tokens for _, sample in steps) / sum(seconds for seconds, _ in steps) if steps else 0.0


def even_after(run: Run, kind: int) -> str:
    """Seconds until the rows of a traffic were nearly even; the first sample includes the traffic before it."""
    measured = [s for _, s in run.part(kind) if s.rows][1:]
    return next((f"{s.at - kind * run.seconds:.0f}" for s in measured if max_over_mean([s.rows]) <= NEARLY_EVEN), "")


def p99(seconds: list[float]) -> str:
    return f"{np.percentile(seconds, 99) * 1e3:.0f}" if seconds else ""


def max_over_mean(of_ranks: list[list[float] | None]) -> float:
    total_W = np.sum([values for values in of_ranks if values is not None], axis=0)
    return float(np.max(total_W) / np.mean(total_W))


def plot(ways: dict[str, list[Run]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    seconds = max(run.seconds for runs in ways.values() for run in runs)
    for number, (way, runs) in enumerate(ways.items()):
        for repeat, run in enumerate(runs):
            # the two runs of half the length are drawn in the first and second half of each traffic
            shift = [(kind * seconds + repeat * run.seconds) - kind * run.seconds for kind in range(2)]
            for kind in range(2):
                steps = run.part(kind)
                edges = np.arange(kind, kind + 1.001, max(2.0, seconds / 10) / run.seconds) * run.seconds
                ats = [s.at for _, s in steps]
                tokens, _ = np.histogram(ats, edges, weights=[s.tokens for _, s in steps])
                count, _ = np.histogram(ats, edges)
                waited, _ = np.histogram(ats, edges, weights=[s.seconds for _, s in steps])
                style: dict[str, Any] = {"color": f"C{number}", "label": way if kind == repeat == 0 else None}
                axes[0].step(edges[1:] + shift[kind], tokens / np.diff(edges), **style)
                axes[1].step(edges[1:] + shift[kind], waited / np.maximum(count, 1) * 1e3, **style)
                rows = [(s.at + shift[kind], max_over_mean([s.rows])) for _, s in steps[1:] if s.rows]
                axes[2].plot(*np.transpose(rows), **style)
    axes[0].legend(title="balance")
    for panel, label in zip(axes, ("tokens/s", "step, ms", "max/mean rows over ranks"), strict=True):
        panel.set_ylabel(label)
        panel.axvline(seconds, color="0.7", linestyle=":")
        panel.set_ylim(bottom=0)
    axes[2].set_xlabel("seconds; the traffic changes in the middle")
    figure.savefig(file, dpi=120)
