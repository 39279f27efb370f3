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
import inspect
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer import Placement, plan_eplb, plan_placement, quotas, rank_loads, split_tokens
from moe_runtime.balancer.live.rebalancer import ROUTE_STEPS
from moe_runtime.balancer.live.replica_table import ReplicaTables
from moe_runtime.balancer.synthetic import BURST, SYNTHETIC, drifted

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "balancer"
RECORDED = OUT / "recorded.npz"
SEED = 20
NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, NUM_SLOTS = 16, 256, 32, 9
RECORDED_RANKS, RECORDED_SLOTS = 8, 5
RECORDED_TOP_K = (20, 4)  # the demo model's own, and one with more skew
LARGE_RANKS, LARGE_SLOTS = (144, 320), 320
ROUTE_SHAPES = {  # layers, experts, ranks, slots of a rank, rows of a rank in a layer and step
    "48 layers, 128 experts, 4 ranks": (48, 128, 4, 33, 256),
    "58 layers, 256 experts, 32 ranks": (58, 256, 32, 9, 256),
}
MOVES = 4  # per layer
ROUNDS = 8  # rounds of time measurements
NUM_WINDOWS = 16
DRIFT = 0.4  # log-normal drift of the load between planning and measuring
DRIFT_A_WINDOW = 0.2
BURST_STAYS = 0.7
NUM_TOKENS = 4096  # tokens of each kind of text

LABELS = {
    "none": "experts in order",
    "eplb, replanned": "eplb, replanned: nearly all slots move",
    "ours": f"ours, at most {MOVES} moves a layer",
}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """A load over time, [N, L, E], and the ranks and slots to place it on."""

    name: str
    load_NLE: Floats
    num_ranks: int
    num_slots: int


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


def synthetic_settings() -> list[Setting]:
    """For `compare`: two windows, DRIFT apart."""
    settings = []
    for number, (name, make) in enumerate(SYNTHETIC.items()):
        rng = np.random.default_rng([SEED, number])
        load_LE = np.stack([make(rng, NUM_EXPERTS) for _ in range(NUM_LAYERS)])
        settings.append(Setting(name, np.stack([load_LE, drifted(rng, load_LE, DRIFT)]), NUM_RANKS, NUM_SLOTS))
    return settings


def synthetic_series() -> list[Setting]:
    """For `follow`: loads that drift; in the bursty load, bursts end and others begin."""
    settings = []
    for number, (name, make) in enumerate(SYNTHETIC.items()):
        rng = np.random.default_rng([SEED, number, 1])
        load_LE = np.stack([make(rng, NUM_EXPERTS) for _ in range(NUM_LAYERS)])
        if name == "bursty":
            windows = list(_bursts(rng))
        else:
            windows = [load_LE]
            for _ in range(NUM_WINDOWS):
                windows.append(drifted(rng, windows[-1], DRIFT_A_WINDOW))
        settings.append(Setting(name, np.stack(windows), NUM_RANKS, NUM_SLOTS))
    return settings


def _bursts(rng: np.random.Generator) -> list[Floats]:
    base_LE = rng.gamma(2, 1, (NUM_LAYERS, NUM_EXPERTS))
    bursts_LE = rng.random(base_LE.shape) < 1 / 40
    windows = []
    for _ in range(NUM_WINDOWS + 1):
        windows.append(base_LE * np.where(bursts_LE, BURST, 1))
        stays_LE = bursts_LE & (rng.random(base_LE.shape) < BURST_STAYS)
        bursts_LE = stays_LE | (rng.random(base_LE.shape) < (1 - BURST_STAYS) / 40)
    return windows


def recorded_settings() -> list[Setting]:
    """The demo model's recorded loads, one kind of text after the other."""
    with np.load(RECORDED) as file:
        return [
            Setting(
                f"demo, {top_k} of 32",
                file[f"top_{top_k}"].astype(np.float64),
                RECORDED_RANKS,
                RECORDED_SLOTS,
            )
            for top_k in RECORDED_TOP_K
        ]


def record() -> None:
    """Run texts of different kinds through the demo model, and save how many tokens each expert got."""
    from transformers import AutoTokenizer

    from moe_runtime import LLM, SamplingParams
    from moe_runtime.demo.checkpoint import ensure_demo_model
    from moe_runtime.demo.texts import QUESTIONS, TOPICS

    texts = {
        "questions": "\n".join(question.format(topic) for topic in TOPICS for question in QUESTIONS),
        "code": inspect.getsource(argparse),
        "page": (ROOT / "moe_runtime" / "balancer" / "heatmap.html").read_text(encoding="utf-8"),
        "licence": (ROOT / "LICENSE").read_text(encoding="utf-8"),
    }
    counts = {}
    for top_k in RECORDED_TOP_K:
        with tempfile.TemporaryDirectory() as directory:
            for file in ensure_demo_model().iterdir():
                (Path(directory) / file.name).symlink_to(file)
            config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
            (Path(directory) / "config.json").unlink()
            (Path(directory) / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": top_k}))
            tokenizer = AutoTokenizer.from_pretrained(directory)
            with LLM(directory) as llm:
                windows = []
                for text in texts.values():
                    before = llm.expert_load().total
                    prompt = {"prompt_token_ids": tokenizer.encode(text)[:NUM_TOKENS]}
                    llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
                    windows.append(llm.expert_load().total - before)
        counts[f"top_{top_k}"] = np.stack(windows)
    np.savez_compressed(RECORDED, **counts, kinds=np.array(list(texts)))


def times() -> dict[str, dict[str, float]]:
    """Milliseconds per layer of sharing, planning and replanning: the best of ROUNDS, medians over layers.

    Each round measures all loads, so that a slow moment of the machine does not affect all rounds of one load.
    """
    measured: dict[tuple[str, str], Callable[[int], object]] = {}
    for setting in synthetic_settings():
        load_LE, later_LE = setting.load_NLE
        size = (setting.num_ranks, setting.num_slots)
        ours = plan_placement(load_LE, *size).placement
        runs: dict[str, Callable[[int], object]] = {
            "split_tokens, planned": lambda n, load=load_LE, at=ours: split_tokens(load[n], at.slots[n]),
            "split_tokens, drifted": lambda n, load=later_LE, at=ours: split_tokens(load[n], at.slots[n]),
            "plan_eplb": lambda n, load=load_LE, size=size: plan_eplb(load[n : n + 1], *size),
            "plan_placement": lambda n, load=load_LE, size=size: plan_placement(load[n : n + 1], *size),
            "plan_placement, 4 moves": lambda n, load=later_LE, size=size, at=ours: plan_placement(
                load[n : n + 1], *size, Placement(at.slots[n : n + 1], NUM_EXPERTS, (0,)), max_moves=MOVES
            ),
        }
        measured |= {(setting.name, name): run for name, run in runs.items()}
    rounds = [
        {key: [_milliseconds(run, n) for n in range(NUM_LAYERS)] for key, run in measured.items()}
        for _ in range(ROUNDS)
    ]
    table: dict[str, dict[str, float]] = {}
    for load, name in measured:
        best_L = np.min([found[load, name] for found in rounds], axis=0)
        table.setdefault(load, {})[name] = float(np.median(best_L))
    return table


def large_times() -> dict[str, dict[str, float]]:
    """Milliseconds per layer of planning for many ranks: 256 experts in 320 slots, medians of 3 loads of 2 layers."""
    table: dict[str, dict[str, float]] = {}
    for num_ranks in LARGE_RANKS:
        num_slots = [LARGE_SLOTS // num_ranks + (rank < LARGE_SLOTS % num_ranks) for rank in range(num_ranks)]
        size = (num_ranks, num_slots)
        for number, (name, make) in enumerate(SYNTHETIC.items()):
            milliseconds = []
            for repeat in range(3):
                rng = np.random.default_rng([SEED, number, repeat])
                load_LE = np.stack([make(rng, NUM_EXPERTS) for _ in range(2)])
                later_LE = drifted(rng, load_LE, DRIFT)
                start = time.perf_counter()
                current = plan_placement(load_LE, *size).placement
                middle = time.perf_counter()
                plan_placement(later_LE, *size, current, max_moves=2 * MOVES)
                milliseconds.append(np.diff([start, middle, time.perf_counter()]) / 2 * 1e3)
            first, later = np.median(milliseconds, axis=0).tolist()
            table[f"{name}, {num_ranks} ranks"] = {"plan_placement": first, f"plan_placement, {MOVES} moves": later}
    return table


def route_times() -> dict[str, dict[str, float]]:
    """Milliseconds that replica choice costs the front between steps, and the number of replica tables to send.

    Zipf loads, each rank with its own drift; the counts of ROUTE_STEPS steps are drawn anew each time.
    """
    table = {}
    for name, (num_layers, num_experts, num_ranks, num_slots, rows) in ROUTE_SHAPES.items():
        rng = np.random.default_rng(SEED)
        load_LE = np.stack([SYNTHETIC["zipf"](rng, num_experts) for _ in range(num_layers)])
        placement = plan_placement(load_LE, num_ranks, num_slots).placement.in_slots(num_slots + 1)
        replica_tables = ReplicaTables(placement)
        load_VLE = drifted(rng, np.repeat(load_LE[None], num_ranks, axis=0))
        load_VLE *= rows * ROUTE_STEPS / load_VLE.sum(axis=2, keepdims=True)
        seconds, news = [], []
        for step in range(20 * ROUTE_STEPS):
            counts_VLE = rng.poisson(load_VLE) if step % ROUTE_STEPS == 0 else None
            start = time.perf_counter()
            if counts_VLE is not None:
                replica_tables.weigh(counts_VLE)
            replica_tables.advance()
            told = replica_tables.take_news()
            seconds.append(time.perf_counter() - start)
            news.append(sum(map(len, told)) / num_ranks if told else 0)
        table[name] = {
            "milliseconds a step": statistics.mean(seconds[ROUTE_STEPS:]) * 1e3,
            "most": max(seconds[ROUTE_STEPS:]) * 1e3,
            "replica_tables told to a rank, a step": statistics.mean(news[ROUTE_STEPS:]),
        }
    return table


def at_home() -> dict[str, float]:
    """The part of tokens that stay on their rank if it has a replica of their expert: ours, and by shares alone."""
    rng = np.random.default_rng(SEED)
    ours = shares = total = 0.0
    load_LE = np.stack([SYNTHETIC["zipf"](rng, NUM_EXPERTS) for _ in range(NUM_LAYERS)])
    placement = plan_placement(load_LE, NUM_RANKS, NUM_SLOTS).placement
    for load_E, hosts_WE, slots_WS in zip(load_LE, placement.hosts, placement.slots, strict=True):
        count_VE = rng.poisson(drifted(rng, np.repeat(load_E[None], NUM_RANKS, axis=0)) * 1e3)
        share_EW = split_tokens(count_VE.sum(axis=0), slots_WS)
        has_replica_VE = hosts_WE & (hosts_WE.sum(axis=0) > 1)
        quota_VEW = quotas(count_VE, share_EW)
        rank = np.arange(NUM_RANKS)
        ours += float(quota_VEW[rank, :, rank][has_replica_VE].sum())
        shares += float((count_VE * share_EW.T)[has_replica_VE].sum())
        total += float(count_VE[has_replica_VE].sum())
    return {"quotas": ours / total, "shares alone": shares / total}


def _milliseconds(run: Callable[[int], object], number: int) -> float:
    start = time.perf_counter()
    run(number)
    return (time.perf_counter() - start) * 1e3


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
