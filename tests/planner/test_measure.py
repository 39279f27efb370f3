"""Measuring this machine: that figures are sound, not what they are."""

from __future__ import annotations

import os

import numpy as np
import pytest
from tiny_models import make_model, save

from moe_runtime.build import build_engine
from moe_runtime.config import EngineConfig
from moe_runtime.kernels.cpu.native import load_or_none
from moe_runtime.planner.measure import efficiency_of, table_of
from moe_runtime.planner.measure_engine import StepTimer, Variant, probe_steps

needs_native = pytest.mark.skipif(load_or_none() is None, reason="no native kernels")


@needs_native
def test_every_figure_of_the_kernels_is_a_number_above_zero(monkeypatch):
    from moe_runtime.planner import measure_kernels as kernel

    monkeypatch.setattr(kernel, "BEYOND_CACHES", 16 << 20)
    monkeypatch.setattr(kernel, "BUDGET", 0.0)
    monkeypatch.setattr(kernel, "ROWS", (1, 4, 32))
    kernels = load_or_none()
    before = kernels.num_threads
    bench = kernel.KernelBench(kernels, len(os.sched_getaffinity(0)))
    figures = bench.figures()
    assert kernels.num_threads == before
    names = {"read", "rate float32", "rate bfloat16", "rows float32", "rows bfloat16"}
    spare = {"slot", "expert byte"}  # beyond what is computed: by chance nothing
    assert {name for name, _ in figures} == names | spare | {"decode", "prompt", "layer byte", "copy"}
    assert all(np.isfinite(value) and value >= 0 for value in figures.values())
    assert all(value > 0 for (name, _), value in figures.items() if name not in spare)
    assert [rows for rows, _ in table_of(figures, "rows bfloat16")] == [1, 4, 32]


def test_efficiency_never_lets_more_rows_take_less():
    found = efficiency_of(((1, 4.0), (2, 2.0), (8, 5.0), (64, 32.0)))
    rows, share = np.array(found).T
    assert (np.diff(rows / share) >= -1e-12).all()
    assert max(share) == 1.0 and share[0] == pytest.approx(1 / 4 / 2)


@needs_native
def test_probe_models_take_turns(tmp_path, monkeypatch):
    from moe_runtime.planner import measure_engine

    monkeypatch.setattr(measure_engine, "PROBE_TOKENS", 8)
    variants = [Variant(1, 1), Variant(1, 1, sending=True)]
    found = probe_steps(tmp_path, variants, [(1, 8), (2, 16)], rounds=2)
    assert [len(cases) for cases in found] == [2, 2]
    assert all(times.prefill > 0 and times.decode > 0 and times.decode_busy is None for each in found for times in each)


def test_steps_of_an_engine_are_timed(tmp_path):
    save(make_model("qwen3"), tmp_path)
    engine = build_engine(EngineConfig(model=str(tmp_path), skip_tokenizer_init=True, max_num_seqs=4))
    try:
        timer = StepTimer(engine)
        for _ in range(2):
            times = timer.run([[3, 4, 5], [6, 7]], 8)
            assert times.prefill > 0 and times.decode > 0 and times.decode_busy is None
        assert engine.stats().finished == {"length": 4} and not engine.has_work
    finally:
        engine.close()
