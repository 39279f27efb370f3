"""This machine's hardware profile, measured: cores, native kernels, and the engine's own overheads."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_runtime.budget import PROCESS_BYTES, available_host_memory
from moe_runtime.planner.hardware import Hardware, Link, Overheads, Table
from moe_runtime.planner.predict import Workload, predict
from moe_runtime.planner.shape import ModelShape

PROBE_LAYERS = (2, 12)
PROBE_BATCHES = (2, 32)
NOTHING = Overheads(step=0, step_ranks=0, step_row=0, layer=0, layer_row=0, slot=0)


def measure(name: str, rounds: int = 5, say: Callable[[str], None] = print) -> Hardware:
    """The profile of this machine's cores, those that this process may use. Takes about a minute.

    A shared machine is faster in one second than in the next, so every figure is the median of so many rounds, each
    of which measures all of them.

    Args:
        name: for reports.
        say: told what is being measured.

    Raises:
        ValueError: there are no native CPU kernels.
    """
    hardware = _measure_kernels(name, rounds, say)
    with tempfile.TemporaryDirectory(prefix="moe-runtime-profile-") as folder:
        return _measure_engine(hardware, Path(folder), rounds, say)


def _measure_kernels(name: str, rounds: int, say: Callable[[str], None]) -> Hardware:
    from moe_runtime.kernels.cpu.build import NativeUnavailableError
    from moe_runtime.kernels.cpu.native import load
    from moe_runtime.planner import measure_kernels as kernel

    try:
        kernels = load()
    except NativeUnavailableError as error:
        raise ValueError(f"profile: there are no native CPU kernels to measure: {error}") from error
    cores = len(os.sched_getaffinity(0))
    bench = kernel.KernelBench(kernels, cores)
    found = []
    for number in range(rounds):
        say(f"kernels, round {number + 1} of {rounds}")
        found.append(bench.figures())
    figure = {key: statistics.median(figures[key] for figures in found) for key in found[0]}
    bandwidth = table_of(figure, "read")
    rate = {dtype: table_of(figure, f"rate {dtype}") for dtype in kernel.DTYPES}
    efficiency = {dtype: efficiency_of(table_of(figure, f"rows {dtype}")) for dtype in kernel.DTYPES}
    row = efficiency["bfloat16"][0][1] * rate["bfloat16"][0][1]  # of one row, on one thread
    # two bytes and two operations for each weight
    work = max(bench.experts_bytes / bandwidth[0][1], bench.experts_bytes / row)
    measured = f"measured, {kernels.instruction_set}"
    sources = {
        "ranks_per_node": "a rank has at least a core; more take turns",
        "memory_bytes": "free for this process",
        "reserved_bytes": "interpreter and libraries of a rank",
        "memory_bandwidth": f"{measured}: Kernels.read, by threads",
        "attention_bandwidth": f"{measured}: {kernel.DECODE_SEQUENCES} sequences of {kernel.DECODE_KEYS} keys",
        "attention_rate": f"{measured}: a prompt of {kernel.PROMPT} tokens",
        "attention_dtype": "this runtime",
        "output_multiple": "this runtime: panels of packed weights",
        "rows_out": "this runtime: a row goes once to each rank that needs it",
        "rows_back": "this runtime: one row for each (token, k)",
        "overlap": "this runtime: computing and sending take turns",
        "overheads.slot": f"{measured}: {kernel.SLOTS} small experts with a row each",
        "intra_node.bandwidth": "measured: a copy on one thread",
        "inter_node.bandwidth": "assumed: 10 Gb/s Ethernet",
        "inter_node.latency": "assumed: TCP",
    }
    for dtype in kernel.DTYPES:
        size = f"{kernel.OUTPUTS} x {kernel.INPUTS}"
        sources[f"matrix_rate.{dtype}"] = f"{measured}: {max(kernel.ROWS)} rows by {size}, by threads"
        sources[f"efficiency.{dtype}"] = f"{measured}: {size}, weights from memory, one thread, by rows"
    return Hardware(
        name=name,
        cores=cores,
        ranks_per_node=max(4 * cores, 8),
        memory_bytes=float(available_host_memory()),
        reserved_bytes=float(PROCESS_BYTES),
        memory_bandwidth=bandwidth,
        matrix_rate=rate,
        efficiency=efficiency,
        attention_bandwidth=min(figure["decode", 0] / bandwidth[-1][1], 1.0),
        attention_rate=min(figure["prompt", 0] / rate["bfloat16"][-1][1], 1.0),
        attention_dtype="bfloat16",
        output_multiple=64,
        intra_node=Link(figure["copy", 0], 0.0),
        inter_node=Link(1.2e9, 1e-4),
        rows_out="rank",
        rows_back="expert",
        overlap=1,
        overheads=replace(NOTHING, slot=max((figure["experts", 0] - work) / kernel.SLOTS, 0.0)),
        sources=sources,
    )


def _measure_engine(hardware: Hardware, folder: Path, rounds: int, say: Callable[[str], None]) -> Hardware:
    """Fit step, rows and layers to steps of the probe model, and the latency of an exchange to those with two ranks."""
    from moe_runtime.models import load_model_config
    from moe_runtime.planner.measure_engine import probe_steps

    spare: dict[int, dict[tuple[int, int], float]] = {1: {}, 2: {}}
    for ep_size, layers in ((size, layers) for size in spare for layers in PROBE_LAYERS):
        say(f"steps of the engine, {ep_size} rank(s), {layers} layers")
        found = probe_steps(folder, layers, ep_size, PROBE_BATCHES, rounds)
        shape = ModelShape.of(load_model_config(folder), "bfloat16", "probe")
        for batch, seconds in zip(PROBE_BATCHES, found, strict=True):
            spare[ep_size][layers, batch] = seconds - _work(hardware, shape, ep_size, batch)
    step, step_row, layer, layer_row = fit_overheads(spare[1], 1)
    step_ranks, _, layer_ranks, _ = fit_overheads(spare[2], 2)
    over = Overheads(step, step_ranks, step_row, layer, layer_row, hardware.overheads.slot)
    link = replace(hardware.intra_node, latency=max(layer_ranks - layer, 0.0) / 2)
    told = (
        f"measured: steps of an engine of {PROBE_LAYERS} small layers with {PROBE_BATCHES} sequences, less their work"
    )
    sources = dict(hardware.sources) | {
        f"overheads.{name}": told for name in ("step", "step_ranks", "step_row", "layer", "layer_row")
    }
    sources["intra_node.latency"] = "measured: half of what a layer takes longer with two ranks"
    return replace(hardware, overheads=over, intra_node=link, sources=sources)


def _work(hardware: Hardware, shape: ModelShape, ep_size: int, batch: int) -> float:
    """What the prediction says of a step before there are overheads."""
    from moe_runtime.balancer.placement import Placement
    from moe_runtime.planner.routing import ASSUMED_LAYERS, LoadRouting

    routing = LoadRouting.assume("uniform", shape.num_experts, shape.top_k)
    placement = Placement.even(ASSUMED_LAYERS, shape.num_experts, ep_size)
    return predict(shape, hardware, placement, routing, Workload("decode", batch, 32)).step_seconds


def fit_overheads(spare: Mapping[tuple[int, int], float], num_ranks: int) -> tuple[float, float, float, float]:
    """Seconds of a step, of a sequence, of a layer, and of a token in a layer, none of them negative.

    Solves seconds = step + rows * step_row + layers * (layer + rows * layer_row) for the four steps measured, `rows`
    being those of a rank.

    Args:
        spare: seconds without the work, by layers and sequences; two of each.
        num_ranks: ranks that share the sequences.
    """
    terms, seconds = [], []
    for (layers, batch), value in spare.items():
        rows = batch / num_ranks
        terms.append([1.0, rows, layers, layers * rows])
        seconds.append(value)
    found = np.linalg.solve(np.array(terms), np.array(seconds))
    step, step_row, layer, layer_row = np.maximum(found, 0.0).tolist()
    return step, step_row, layer, layer_row


def table_of(figures: Mapping[tuple[str, int], float], name: str) -> Table:
    """The figures of one name, by their number."""
    return tuple(sorted((float(number), value) for (what, number), value in figures.items() if what == name))


def efficiency_of(seconds: Table) -> Table:
    """Share of the best rate by rows, from seconds by rows; more rows never take less."""
    rows = [row for row, _ in seconds]
    rising = list(itertools.accumulate((spent for _, spent in seconds), max))
    best = max(row / spent for row, spent in zip(rows, rising, strict=True))
    return tuple((row, min(row / spent / best, 1.0)) for row, spent in zip(rows, rising, strict=True))
