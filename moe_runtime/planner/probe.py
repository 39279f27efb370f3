"""Compares steps of small models with their predictions; the additional time is overhead."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from moe_runtime.balancer.cost import least_squares
from moe_runtime.balancer.placement import Placement
from moe_runtime.planner.hardware import Hardware
from moe_runtime.planner.measure_engine import PROBE_DECODE_PROMPT, StepTimes, Variant, probe_steps
from moe_runtime.planner.predict import Prediction, Workload, predict
from moe_runtime.planner.routing import ASSUMED_LAYERS, LoadRouting
from moe_runtime.planner.shape import ModelShape

if TYPE_CHECKING:
    from moe_runtime.planner.pace import Pace

TOKENS = 48  # new tokens of a sequence in a run


def with_overheads(hardware: Hardware, **seconds: float) -> Hardware:
    """The profile with these overheads; "latency" is the link latency within a node."""
    latency = seconds.pop("latency", hardware.intra_node.latency)
    return replace(
        hardware,
        overheads=replace(hardware.overheads, **seconds),
        intra_node=replace(hardware.intra_node, latency=latency),
    )


@dataclass(frozen=True)
class ProbedStep:
    """Times of a probe model's step in each round, with an even load.

    Attributes:
        runs: times, and the machine's bandwidth at that time as a share of the profile's.
    """

    variant: Variant
    work: Workload
    shape: ModelShape
    runs: Sequence[tuple[StepTimes, float]]

    def predict(self, hardware: Hardware, read: float = 1.0) -> Prediction:
        """The prediction for this step, with the bandwidth multiplied by `read`."""
        routing = LoadRouting.assume("uniform", self.shape.num_experts, self.shape.top_k)
        placement = Placement.even(ASSUMED_LAYERS, self.shape.num_experts, self.variant.ep_size)
        return predict(self.shape, hardware.at_pace(read, 1.0), placement, routing, self.work)

    def spare(self, hardware: Hardware, what: Literal["decode", "prefill", "busy"]) -> list[float]:
        """Measured minus predicted seconds, in each round."""

        def beyond(times: StepTimes, read: float) -> float:
            predicted = self.predict(hardware, read)
            if what == "busy":
                assert times.decode_busy is not None
                return times.decode_busy - predicted.busy_seconds
            return (times.decode if what == "decode" else times.prefill) - predicted.step_seconds

        return [beyond(*run) for run in self.runs]


@dataclass(frozen=True)
class Probe:
    """Runs small models; `say` is called with a line about what is being measured."""

    folder: Path
    rounds: int
    say: Callable[[str], None]
    pace: Pace

    def steps(self, variants: Sequence[Variant], works: Sequence[Workload], tokens: int = TOKENS) -> list[ProbedStep]:
        """A step of each model with each workload; a run has `tokens` new tokens per sequence."""
        from moe_runtime.models.registry import read_model_config

        for variant in variants:
            self.say(f"steps of the engine, {variant.ep_size} rank(s), {variant.num_layers} layers")
        cases = [(work.sequences, work.length if work.phase == "prefill" else PROBE_DECODE_PROMPT) for work in works]
        found = probe_steps(self.folder, variants, cases, tokens, self.rounds, self.pace.read)
        shapes = [
            ModelShape.of(read_model_config(self.folder / f"{number}"), "bfloat16", "probe")
            for number in range(len(variants))
        ]
        return [
            ProbedStep(variant, work, shape, runs)
            for variant, shape, of_variant in zip(variants, shapes, found, strict=True)
            for work, runs in zip(works, of_variant, strict=True)
        ]


def fit(hardware: Hardware, found: Sequence[ProbedStep], names: Sequence[str]) -> dict[str, float]:
    """Non-negative overheads in seconds that fit predictions to the measured steps.

    Least squares, relative to each step's time; predictions are linear in the overheads.

    Args:
        names: overheads that are 0 in `hardware`, or "latency".
    """
    terms, spare = [], []
    for step in found:
        whole = statistics.median(times.decode for times, _ in step.runs)
        alone = step.predict(hardware).step_seconds
        more = [step.predict(with_overheads(hardware, **{name: 1.0})).step_seconds - alone for name in names]
        terms.append(np.array(more) / whole)
        spare.append(statistics.median(step.spare(hardware, "decode")) / whole)
    return dict(zip(names, least_squares(np.array(terms), np.array(spare)), strict=True))
