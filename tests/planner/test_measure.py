"""Measuring this machine: tests that figures are plausible, not their values."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import make_model, save

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.kernels.cpu.loader import load_or_none
from moe_runtime.models.registry import read_model_config
from moe_runtime.planner.hardware_file import load_hardware
from moe_runtime.planner.measure import cold_factor_of, efficiency_of, table_of
from moe_runtime.planner.measure_engine import StepTimer, Variant, probe_steps, streaming

needs_native = pytest.mark.skipif(load_or_none() is None, reason="no native kernels")


@needs_native
def test_every_figure_of_the_kernels_is_a_number_above_zero(monkeypatch):
    from moe_runtime.planner import measure_kernels as kernel

    monkeypatch.setattr(kernel, "BEYOND_CACHES", 16 << 20)
    monkeypatch.setattr(kernel, "BUDGET", 0.0)
    monkeypatch.setattr(kernel, "ROWS", (1, 4, 32))
    monkeypatch.setattr(kernel, "STREAM_OUTPUTS", 4096)
    monkeypatch.setattr(kernel, "EXPERTS", 4)
    monkeypatch.setattr(kernel, "COLD_BYTES", (0, 1 << 20, 4 << 20))
    kernels = load_or_none()
    before = kernels.num_threads
    bench = kernel.KernelBench(kernels, len(os.sched_getaffinity(0)))
    figures = bench.figures()
    assert kernels.num_threads == before
    of_dtypes = {f"{what} {dtype}" for what in ("rate", "rows", "weight") for dtype in ("float32", "bfloat16")}
    alone = {"read", "experts", "decode", "prompt", "calls", "layer byte", "copy"}
    spare = {"slot", "expert byte"}  # beyond what is computed: by chance nothing
    assert {name for name, _ in figures} == of_dtypes | alone | spare
    assert all(np.isfinite(value) and value >= 0 for value in figures.values())
    assert all(value > 0 for (name, _), value in figures.items() if name not in spare)
    assert [rows for rows, _ in table_of(figures, "rows bfloat16")] == [1, 4, 32]
    assert [nbytes for nbytes, _ in table_of(figures, "calls")] == [0, 1 << 20, 4 << 20]
    assert figures["weight float32", 0] == 4.0


@needs_native
def test_pace_is_a_share_of_the_profile(monkeypatch):
    from moe_runtime.planner import measure_kernels as kernel
    from moe_runtime.planner.pace import Pace

    monkeypatch.setattr(kernel, "BEYOND_CACHES", 16 << 20)
    monkeypatch.setattr(kernel, "BUDGET", 0.01)
    monkeypatch.setattr(kernel, "STREAM_OUTPUTS", 4096)
    hardware = replace(load_hardware("cpu"), cores=1, memory_bandwidth=((1.0, 1.0),))
    kernels = load_or_none()
    before = kernels.num_threads
    pace = Pace(kernels, hardware)
    read, rate = pace.now()
    assert kernels.num_threads == before
    assert read > 1e6 and 0 < rate < 100  # bytes/s, for the profile's is 1; the profile's rate is that of a server


def test_cold_factors_begin_at_one_and_never_fall():
    assert cold_factor_of(((0, 2.0), (8, 3.0), (16, 2.5), (32, 8.0))) == ((0, 1.0), (8, 1.5), (16, 1.5), (32, 4.0))


def test_efficiency_never_lets_more_rows_take_less():
    found = efficiency_of(((1, 4.0), (2, 2.0), (8, 5.0), (64, 32.0)))
    rows, share = np.array(found).T
    assert (np.diff(rows / share) >= -1e-12).all()
    assert max(share) == 1.0 and share[0] == pytest.approx(1 / 4 / 2)


@needs_native
def test_probe_models_take_turns(tmp_path):
    paces = iter(np.arange(100.0))
    variants = [Variant(1, 1), streaming(1, 2, 4 << 20)]
    found = probe_steps(tmp_path, variants, [(1, 8), (2, 16)], 8, 2, lambda: next(paces))
    assert [len(cases) for cases in found] == [2, 2]
    runs = np.array([[[pace for _, pace in case] for case in cases] for cases in found])
    assert (runs[..., 0] == [[4.5, 5.5], [6.5, 7.5]]).all() and (runs[..., 1] == runs[..., 0] + 4).all()  # in turn
    for times in (times for cases in found for case in cases for times, _ in case):
        assert times.prefill > 0 and times.decode > 0 and times.decode_busy is None
    read = read_model_config(tmp_path / "1").moe
    assert read.num_experts == read.top_k
    assert 0.8 < read.num_experts * 3 * 512 * read.intermediate_size * 2 / (4 << 20) <= 1


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
