"""This machine's hardware profile, measured: cores, native kernels, and the engine's own overheads."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_runtime.budget import PROCESS_BYTES, available_host_memory
from moe_runtime.planner.hardware import Hardware, Link, Overheads, Table
from moe_runtime.planner.measure_engine import PROBE_DECODE_PROMPT, StepTimes, Variant, probe_steps
from moe_runtime.planner.predict import Prediction, Workload, predict
from moe_runtime.planner.shape import ModelShape

PROBE_LAYERS = (2, 12)
PROBE_BATCHES = (2, 32)
PROBE_KEYS = 32  # in the middle of a run
PROBE_PROMPT = 512
TURNS_RANKS, TURNS_CORES, TURNS_BATCHES = 4, 2, (1, 4)


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
        "overheads.layer_byte": f"{measured}: a weighted sum of {kernel.SUM_TOP_K} rows and two norms, one thread",
        "overheads.slot": f"{measured}: {kernel.SLOTS} small experts with a row each, one thread",
        "overheads.expert_byte": f"{measured}: {kernel.SLOTS} small experts, {kernel.SLOT_ROWS} rows each, one thread",
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
        sources=sources,
    )


def _measure_engine(hardware: Hardware, folder: Path, rounds: int, say: Callable[[str], None]) -> Hardware:
    """Fit what steps of the probe models take beside their work.

    With two ranks a layer takes longer by two latencies, and prompts by the rows that are sent. With more ranks than
    cores each spends processor time waiting.
    """
    few, many = PROBE_LAYERS
    probe = Probe(folder, rounds, say)
    cached = replace(hardware, memory_bandwidth=((1.0, math.inf),))  # as weights of such models are
    variants = [Variant(ep_size, layers) for ep_size in (1, 2) for layers in PROBE_LAYERS]
    spare: dict[int, dict[tuple[int, int], float]] = {1: {}, 2: {}}
    for found in probe.steps(cached, variants, [Workload("decode", batch, PROBE_KEYS) for batch in PROBE_BATCHES]):
        seconds = found.times.decode - found.predicted.step_seconds
        spare[found.variant.ep_size][found.variant.num_layers, found.work.sequences] = seconds
    step, step_row, layer, layer_row = fit_overheads(spare[1], 1)
    step_ranks, _, layer_ranks, _ = fit_overheads(spare[2], 2)
    over = replace(
        hardware.overheads, step=step, step_ranks=step_ranks, step_row=step_row, layer=layer, layer_row=layer_row
    )
    link = Link(hardware.intra_node.bandwidth, max(layer_ranks - layer, 0.0) / 2)
    hardware = replace(hardware, overheads=over, intra_node=link)

    # One rank computes the same on all cores: the difference is what is sent.
    variants = [Variant(ep_size, many, sending=True) for ep_size in (1, 2)]
    alone, both = probe.steps(hardware, variants, [Workload("prefill", 2, PROBE_PROMPT)])
    beyond = (both.times.prefill - alone.times.prefill) - (both.predicted.step_seconds - alone.predicted.step_seconds)
    copying = both.predicted.parts["exchange"] - 2 * many * link.latency
    link = replace(link, bandwidth=link.bandwidth * copying / (copying + max(beyond, 0.0)))
    hardware = replace(hardware, intra_node=link)

    cores = min(TURNS_CORES, hardware.cores or 1)
    cached = replace(hardware, cores=cores, memory_bandwidth=cached.memory_bandwidth)
    variants = [Variant(TURNS_RANKS, layers) for layers in PROBE_LAYERS]
    busy: dict[int, list[float]] = {few: [], many: []}
    with _cores(cores):
        for found in probe.steps(cached, variants, [Workload("decode", count, PROBE_KEYS) for count in TURNS_BATCHES]):
            assert found.times.decode_busy is not None
            busy[found.variant.num_layers].append(found.times.decode_busy - found.predicted.busy_seconds)
    waited = statistics.mean(busy[many]) - statistics.mean(busy[few])
    over = replace(over, wait=max(waited, 0.0) / ((many - few) * 2 * TURNS_RANKS))

    told = (
        f"measured: steps of an engine of {PROBE_LAYERS} small layers with {PROBE_BATCHES} sequences, less their work"
    )
    sources = dict(hardware.sources) | {
        f"overheads.{name}": told for name in ("step", "step_ranks", "step_row", "layer", "layer_row")
    }
    sources["overheads.wait"] = f"measured: processor time of {TURNS_RANKS} ranks on {cores} cores"
    sources["intra_node.latency"] = "measured: half of what a layer takes longer with two ranks"
    sources["intra_node.bandwidth"] = f"measured: what two prompts of {PROBE_PROMPT} tokens take longer with two ranks"
    return replace(hardware, overheads=over, sources=sources)


@dataclass(frozen=True)
class ProbedStep:
    """What a step of a probe model took, and what was predicted of it."""

    variant: Variant
    work: Workload
    times: StepTimes
    predicted: Prediction


@dataclass(frozen=True)
class Probe:
    """Runs small models and predicts the same, with even routing; `say` is told what is being measured."""

    folder: Path
    rounds: int
    say: Callable[[str], None]

    def steps(self, hardware: Hardware, variants: Sequence[Variant], works: Sequence[Workload]) -> list[ProbedStep]:
        """A step of each model with each work."""
        for variant in variants:
            self.say(f"steps of the engine, {variant.ep_size} rank(s), {variant.num_layers} layers")
        cases = [(work.sequences, work.length if work.phase == "prefill" else PROBE_DECODE_PROMPT) for work in works]
        all_times = probe_steps(self.folder, variants, cases, self.rounds)
        return [
            ProbedStep(variant, work, times, self._predict(hardware, number, variant, work))
            for number, (variant, of_variant) in enumerate(zip(variants, all_times, strict=True))
            for work, times in zip(works, of_variant, strict=True)
        ]

    def _predict(self, hardware: Hardware, number: int, variant: Variant, work: Workload) -> Prediction:
        from moe_runtime.balancer.placement import Placement
        from moe_runtime.models import load_model_config
        from moe_runtime.planner.routing import ASSUMED_LAYERS, LoadRouting

        shape = ModelShape.of(load_model_config(self.folder / f"{number}"), "bfloat16", "probe")
        routing = LoadRouting.assume("uniform", shape.num_experts, shape.top_k)
        placement = Placement.even(ASSUMED_LAYERS, shape.num_experts, variant.ep_size)
        return predict(shape, hardware, placement, routing, work)


@contextlib.contextmanager
def _cores(most: int) -> Iterator[None]:
    """This process, and those that it starts, on so many of its cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:most])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


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
