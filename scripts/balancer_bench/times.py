"""Times of planning placements, sharing tokens and choosing replicas.

Shape suffixes: V ranks that send, W ranks that compute, L layers, E experts, S slots per rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from balancer_bench.loads import DRIFT, NUM_EXPERTS, NUM_LAYERS, NUM_RANKS, NUM_SLOTS, SEED, synthetic_settings
from moe_runtime.balancer import Placement, plan_eplb, plan_placement, quotas, split_tokens
from moe_runtime.balancer.live.rebalancer import ROUTE_STEPS
from moe_runtime.balancer.live.replica_table import ReplicaTables
from moe_runtime.balancer.synthetic import SYNTHETIC, drifted

MOVES = 4  # per layer
ROUNDS = 8  # rounds of time measurements
LARGE_RANKS, LARGE_SLOTS = (144, 320), 320
ROUTE_SHAPES = {  # layers, experts, ranks, slots of a rank, rows of a rank in a layer and step
    "48 layers, 128 experts, 4 ranks": (48, 128, 4, 33, 256),
    "58 layers, 256 experts, 32 ranks": (58, 256, 32, 9, 256),
}


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
