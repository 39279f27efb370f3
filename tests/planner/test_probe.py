"""Overheads fitted to measured steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_shapes import IDEAL, tiny

from moe_runtime.planner.measure_engine import StepTimes, Variant
from moe_runtime.planner.predict import Workload
from moe_runtime.planner.probe import ProbedStep, fit, with_overheads


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-5, 1e-3), min_size=4, max_size=4), st.floats(0.5, 1.0))
def test_overheads_are_found_again(truth, read):
    """Whatever the bandwidth was while steps were measured."""
    names = ("step", "layer", "step_ranks", "latency")
    hardware = replace(IDEAL, cores=2, cold_factor=((0, 1.0), (1e6, 9.0)))
    actual = with_overheads(hardware, **dict(zip(names, truth, strict=True))).at_pace(read, 1.0)
    found = []
    for ranks, layers, experts in ((1, 4, 8), (1, 16, 2), (2, 4, 8), (2, 16, 2), (2, 4, 32)):
        shape = tiny(num_experts=experts, top_k=experts, num_layers=layers, num_sparse_layers=layers)
        step = ProbedStep(Variant(ranks, layers), Workload("decode", 2, 30), shape, ())
        seconds = step.predict(actual).step_seconds
        found.append(replace(step, runs=[(StepTimes(0.0, seconds, None, None), read)] * 3))
    assert fit(hardware, found, names) == pytest.approx(dict(zip(names, truth, strict=True)), rel=1e-4)
