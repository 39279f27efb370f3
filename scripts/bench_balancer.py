"""Compare placement policies on loads: none (experts in order), `eplb`, and `plan_placement` with a few moves.

All of them share tokens among replicas by `split_tokens`. The loads are synthetic (256 experts per layer on 32 ranks of
9 slots) and recorded (the demo model's 30 layers of 32 experts, on 8 ranks of 5 slots). Balancedness depends only on
the seed and the recorded counts. Times (`--times`) are only meaningful on a quiet machine.

    python scripts/bench_balancer.py                   # tables, benchmarks/balancer/quality.json and balancer.png
    python scripts/bench_balancer.py --times           # and times of planning and sharing
    python scripts/bench_balancer.py --record          # first run texts through the demo model again

Shape suffixes: L layers, E experts, N windows of time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_runtime.balancer import Placement, plan_eplb, plan_placement, rank_loads

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from balancer_bench.loads import (
    OUT,
    SEED,
    Floats,
    Setting,
    record,
    recorded_settings,
    synthetic_series,
    synthetic_settings,
)
from balancer_bench.times import MOVES, at_home, large_times, route_times, times

LABELS = {
    "none": "experts in order",
    "eplb, replanned": "eplb, replanned: nearly all slots move",
    "ours": f"ours, at most {MOVES} moves a layer",
}


@dataclass(frozen=True)
class Quality:
    """Balancedness, mean over the layers (in brackets in the table: the worst layer)."""

    load: str
    planned: dict[str, float]
    worst_planned: dict[str, float]
    drifted: dict[str, float]
    after_moves: dict[str, float]
    moves_a_layer: dict[str, float]


def balancedness(load_LE: Floats, placement: Placement) -> Floats:
    load_LW = rank_loads(load_LE, placement.slots)
    return load_LW.mean(axis=1) / load_LW.max(axis=1)


def compare(setting: Setting) -> Quality:
    """Plan on the first window, measure on it and on the second, then replan on the second."""
    load_LE, later_LE = setting.load_NLE[:2]
    num_layers = len(load_LE)
    size = (setting.num_ranks, setting.num_slots)
    even = Placement.even(num_layers, load_LE.shape[1], setting.num_ranks)
    eplb, ours = plan_eplb(load_LE, *size), plan_placement(load_LE, *size)
    whole = plan_eplb(later_LE, *size, eplb.placement)
    few = plan_placement(later_LE, *size, ours.placement, max_moves=MOVES * num_layers)
    few_from_eplb = plan_placement(later_LE, *size, eplb.placement, max_moves=MOVES * num_layers)
    placements = {"none": even, "eplb": eplb.placement, "ours": ours.placement}
    replanned = {"eplb, all its moves": whole, "ours": few, "ours, from eplb's": few_from_eplb}
    planned = {name: balancedness(load_LE, placement) for name, placement in placements.items()}
    return Quality(
        setting.name,
        {name: float(values.mean()) for name, values in planned.items()},
        {name: float(values.min()) for name, values in planned.items()},
        {name: float(balancedness(later_LE, placement).mean()) for name, placement in placements.items()},
        {name: float(balancedness(later_LE, plan.placement).mean()) for name, plan in replanned.items()},
        {name: len(plan.moves) / num_layers for name, plan in replanned.items()},
    )


def follow(setting: Setting) -> dict[str, list[float]]:
    """Balancedness in every window under placements planned on the previous window."""
    size = (setting.num_ranks, setting.num_slots)
    first_LE = setting.load_NLE[0]
    even = Placement.even(len(first_LE), first_LE.shape[1], setting.num_ranks)
    stale = eplb = plan_eplb(first_LE, *size).placement
    ours = plan_placement(first_LE, *size).placement
    series: dict[str, list[float]] = {"none": [], "eplb, planned once": [], "eplb, replanned": [], "ours": []}
    for before_LE, now_LE in zip(setting.load_NLE[:-1], setting.load_NLE[1:], strict=True):
        eplb = plan_eplb(before_LE, *size, eplb).placement
        ours = plan_placement(before_LE, *size, ours, max_moves=MOVES * len(before_LE)).placement
        for name, placement in zip(series, (even, stale, eplb, ours), strict=True):
            series[name].append(float(balancedness(now_LE, placement).mean()))
    return series


def draw(series: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    styles = {"none": ("#9aa3b2", ":"), "eplb, planned once": ("#5d6b88", "--"), "eplb, replanned": ("#d98324", "-")}
    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    for axes, (load, lines) in zip(panels.ravel(), series.items(), strict=True):
        for name, values in lines.items():
            colour, style = styles.get(name, ("#7b2382", "-"))
            axes.plot(range(1, len(values) + 1), values, style, color=colour, marker=".", label=LABELS.get(name, name))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(load, fontsize=9)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("window (placed for the one before)", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("balancedness", fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=len(labels), loc="outside lower center", frameon=False)
    figure.savefig(path, metadata={"Software": None})


def table_of(qualities: list[Quality]) -> str:
    lines = [
        "| load | planned for: in order | eplb | ours | after drift: in order | eplb | ours "
        f"| {MOVES} moves a layer: ours | from eplb's | eplb anew | its moves a layer |",
        "|---|" + "---|" * 10,
    ]
    for quality in qualities:
        numbers = [
            *quality.planned.values(),
            *quality.drifted.values(),
            quality.after_moves["ours"],
            quality.after_moves["ours, from eplb's"],
            quality.after_moves["eplb, all its moves"],
        ]
        cells = " | ".join(f"{number:.3f}" for number in numbers)
        lines.append(f"| {quality.load} | {cells} | {quality.moves_a_layer['eplb, all its moves']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="route texts through the demo model again")
    parser.add_argument("--times", action="store_true", help="measure times as well")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if arguments.record:
        record()
    recorded = recorded_settings()
    qualities = [compare(setting) for setting in (*synthetic_settings(), *recorded)]
    series = {setting.name: follow(setting) for setting in (*synthetic_series(), recorded[-1])}
    quality = {"seed": SEED, "policies": [asdict(quality) for quality in qualities], "over_time": series}
    (OUT / "quality.json").write_text(json.dumps(quality, indent=1) + "\n", encoding="utf-8")
    draw(series, OUT / "balancer.png")
    print(table_of(qualities))
    if arguments.times:
        measured = {
            "machine": platform.processor() or platform.machine(),
            "milliseconds_a_layer": times() | large_times(),
            "replica_choice": route_times(),
            "tokens_at_home": at_home(),
        }
        (OUT / "times.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
