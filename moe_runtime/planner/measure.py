"""Measures this machine's hardware profile: cores, native kernels, and the engine's own overheads."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.memory.budget import PROCESS_BYTES, available_host_memory
from moe_runtime.planner.hardware import Hardware, Link, Overheads, Table
from moe_runtime.planner.measure_engine import SENDING, WAITING, Variant, streaming
from moe_runtime.planner.predict import Workload
from moe_runtime.planner.probe import Probe, fit, with_overheads
from moe_runtime.types.weight_format import PANEL

if TYPE_CHECKING:
    from moe_runtime.kernels.cpu.native import Kernels

PROBE_ROUNDS = 4  # rounds of short engine runs per round of the kernels
PROBE_LAYERS = (2, 12)
PROBE_BATCHES = (2, 32)
PROBE_KEYS = 32  # keys per sequence in the middle of a run
PROBE_PROMPT = 512
# (layers, bytes of each): a step reads several times the size of the caches, else they would serve a part of it.
STREAMING_LAYERS = ((4, 39 << 20), (40, 15 << 18))
STREAMING_COLD = (4, 96 << 20)  # so large that no layer finds anything in the caches
STREAMING_TOKENS = 16  # few, so that the pace measured around a run is also that of the run
TURNS_RANKS, TURNS_CORES = 4, 2


def measure(name: str, rounds: int = 5, say: Callable[[str], None] = print) -> Hardware:
    """The profile of the cores that this process may use. Takes about two minutes.

    The speed of a shared machine changes from second to second. So every figure is the median of `rounds` rounds (for
    steps of the engine: four times as many short ones), and each round measures all figures.

    Args:
        name: for reports.
        say: called with a line about what is being measured.

    Raises:
        ValueError: there are no native CPU kernels.
    """
    from moe_runtime.kernels.cpu.library import NativeUnavailableError
    from moe_runtime.kernels.cpu.loader import load
    from moe_runtime.planner.pace import Pace

    try:
        kernels = load()
    except NativeUnavailableError as error:
        raise ValueError(f"profile: there are no native CPU kernels to measure: {error}") from error
    hardware = _measure_kernels(kernels, name, rounds, say)
    with tempfile.TemporaryDirectory(prefix="moe-runtime-profile-") as folder:
        probe = Probe(Path(folder), PROBE_ROUNDS * rounds, say, Pace(kernels, hardware))
        return _measure_engine(hardware, probe)


def _measure_kernels(kernels: Kernels, name: str, rounds: int, say: Callable[[str], None]) -> Hardware:
    from moe_runtime.planner import measure_kernels as kernel

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
    return Hardware(
        name=name,
        cores=cores,
        ranks_per_node=max(4 * cores, 8),
        memory_bytes=float(available_host_memory()),
        reserved_bytes=float(PROCESS_BYTES),
        weight_bytes={dtype: figure[f"weight {dtype}", 0] for dtype in kernel.DTYPES},
        memory_bandwidth=bandwidth,
        expert_bandwidth=min(figure["experts", 0] / bandwidth[-1][1], 1.0),
        matrix_rate=rate,
        efficiency=efficiency,
        attention_bandwidth=min(figure["decode", 0] / bandwidth[-1][1], 1.0),
        attention_rate=min(figure["prompt", 0] / rate["bfloat16"][-1][1], 1.0),
        attention_dtype="bfloat16",
        output_multiple=PANEL,
        intra_node=Link(figure["copy", 0], 0.0),
        inter_node=Link(1.2e9, 1e-4),
        rows_out="rank",
        rows_back="expert",
        overlap=1,
        cold_factor=cold_factor_of(table_of(figure, "calls")),
        overheads=Overheads(
            step=0.0,
            step_ranks=0.0,
            step_row=0.0,
            layer=0.0,
            layer_row=0.0,
            layer_byte=figure["layer byte", 0],
            slot=figure["slot", 0],
            expert_byte=figure["expert byte", 0],
            wait=0.0,
        ),
        sources=_kernel_sources(kernels),
    )


def _kernel_sources(kernels: Kernels) -> dict[str, str]:
    """Where each figure of `_measure_kernels` comes from."""
    from moe_runtime.planner import measure_kernels as kernel

    measured = f"measured, {kernels.instruction_set}"
    sources = {
        "ranks_per_node": "a rank has at least a core; more take turns",
        "memory_bytes": "free for this process",
        "reserved_bytes": "interpreter and libraries of a rank",
        "memory_bandwidth": f"{measured}: products of one row by {kernel.STREAM_OUTPUTS} x {kernel.INPUTS}, by threads",
        "expert_bandwidth": f"{measured}: {kernel.EXPERTS} experts of {kernel.HIDDEN} x {kernel.INNER} with a row each",
        "attention_bandwidth": f"{measured}: {kernel.DECODE_SEQUENCES} sequences of {kernel.DECODE_KEYS} keys",
        "attention_rate": f"{measured}: a prompt of {kernel.PROMPT} tokens",
        "attention_dtype": "this runtime",
        "output_multiple": "this runtime: panels of packed weights",
        "rows_out": "this runtime: a row goes once to each rank that needs it",
        "rows_back": "this runtime: one row for each (token, k)",
        "overlap": "this runtime: computing and sending take turns",
        "cold_factor": f"{measured}: some calls of torch and of kernels, by bytes read since the last",
        "overheads.layer_byte": f"{measured}: a weighted sum of {kernel.SUM_TOP_K} rows and two norms, one thread",
        "overheads.slot": f"{measured}: {kernel.SLOTS} small experts with a row each, one thread",
        "overheads.expert_byte": f"{measured}: {kernel.SLOTS} small experts, {kernel.SLOT_ROWS} rows each, one thread",
        "intra_node.bandwidth": "measured: a copy on one thread",
        "inter_node.bandwidth": "assumed: 10 Gb/s Ethernet",
        "inter_node.latency": "assumed: TCP",
    }
    for dtype in kernel.DTYPES:
        size = f"{kernel.OUTPUTS} x {kernel.INPUTS}"
        sources[f"weight_bytes.{dtype}"] = "this runtime: packed weights"
        sources[f"matrix_rate.{dtype}"] = f"{measured}: {max(kernel.ROWS)} rows by {size}, by threads"
        sources[f"efficiency.{dtype}"] = f"{measured}: {size}, weights from memory, one thread, by rows"
    return sources


def _measure_engine(hardware: Hardware, probe: Probe) -> Hardware:
    """Fit the overheads: what steps of the probe models take in addition to their work."""
    # Overheads per row are measured with models that fit into the caches, because their steps are short.
    cached = replace(hardware, memory_bandwidth=((1.0, math.inf),))
    works = [Workload("decode", batch, PROBE_KEYS) for batch in PROBE_BATCHES]
    found = probe.steps([Variant(1, layers) for layers in PROBE_LAYERS], works)
    fitted = fit(cached, found, ("step", "step_row", "layer", "layer_row"))
    hardware = with_overheads(hardware, step_row=fitted["step_row"], layer_row=fitted["layer_row"])

    # The other overheads are measured with weights that stream through the caches.
    variants = [streaming(ep_size, *layers) for ep_size in (1, 2) for layers in STREAMING_LAYERS]
    works = [Workload("decode", 2, PROBE_KEYS)]
    found = probe.steps([*variants, streaming(2, *STREAMING_COLD)], works, STREAMING_TOKENS)
    one_stream = replace(hardware, expert_bandwidth=1.0)  # all experts are used, and are contiguous in memory
    fitted = fit(one_stream, found, ("step", "layer", "step_ranks", "latency"))
    hardware = with_overheads(hardware, **fitted)

    # One rank computes the same on all cores, so the difference is the time of sending.
    layers = max(PROBE_LAYERS)
    variants = [Variant(ep_size, layers, SENDING) for ep_size in (1, 2)]
    alone, both = probe.steps(variants, [Workload("prefill", 2, PROBE_PROMPT)])
    rounds = zip(both.spare(hardware, "prefill"), alone.spare(hardware, "prefill"), strict=True)
    beyond = statistics.median(late - early for late, early in rounds)
    link = hardware.intra_node
    copying = both.predict(hardware).parts["exchange"] - 2 * layers * link.latency
    link = replace(link, bandwidth=link.bandwidth * copying / (copying + max(beyond, 0.0)))
    hardware = replace(hardware, intra_node=link)

    cores = min(TURNS_CORES, hardware.cores or 1)
    one_stream = replace(hardware, cores=cores, expert_bandwidth=1.0)
    few, many = (streaming(TURNS_RANKS, *layers, **WAITING) for layers in STREAMING_LAYERS)
    with _cores(cores):
        found = probe.steps([few, many], [Workload("decode", 1, PROBE_KEYS)], STREAMING_TOKENS)
    early, late = (statistics.median(step.spare(one_stream, "busy")) for step in found)
    wait = max(late - early, 0.0) / ((many.num_layers - few.num_layers) * 2 * (TURNS_RANKS - 1))

    rows = (
        f"measured: steps of an engine of {PROBE_LAYERS} small layers with {PROBE_BATCHES} sequences, less their work"
    )
    rest = "measured: steps of an engine whose weights stream through the caches, less their work"
    sources = dict(hardware.sources) | {
        "overheads.step_row": rows,
        "overheads.layer_row": rows,
        **{f"overheads.{name}": rest for name in ("step", "step_ranks", "layer")},
        "overheads.wait": f"measured: processor time of {TURNS_RANKS} ranks on {cores} cores, one with a sequence",
        "intra_node.latency": "measured: what a layer takes longer with two ranks",
        "intra_node.bandwidth": f"measured: what two prompts of {PROBE_PROMPT} tokens take longer with two ranks",
    }
    return replace(with_overheads(hardware, wait=wait), sources=sources)


@contextlib.contextmanager
def _cores(most: int) -> Iterator[None]:
    """Restrict this process, and processes that it starts, to `most` of its cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:most])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def table_of(figures: Mapping[tuple[str, int], float], name: str) -> Table:
    """The figures of one name, sorted by number."""
    return tuple(sorted((float(number), value) for (what, number), value in figures.items() if what == name))


def efficiency_of(seconds: Table) -> Table:
    """Share of the best rate by rows, from seconds by rows; assumes that more rows never take less time."""
    rows = [row for row, _ in seconds]
    rising = list(itertools.accumulate((spent for _, spent in seconds), max))
    best = max(row / spent for row, spent in zip(rows, rising, strict=True))
    return tuple((row, min(row / spent / best, 1.0)) for row, spent in zip(rows, rising, strict=True))


def cold_factor_of(seconds: Table) -> Table:
    """The slowdown factor by bytes read, from seconds by bytes; assumes that it never falls with more bytes."""
    rising = itertools.accumulate((spent for _, spent in seconds), max)
    return tuple((nbytes, spent / seconds[0][1]) for (nbytes, _), spent in zip(seconds, rising, strict=True))
