"""Counts become windows, each once and in order; steps become demand and a fitted cost model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from counting_ranks import CountingRanks, plan_of

from moe_runtime.balancer.live.load_monitor import MIN_SAMPLES, LoadMonitor, Window
from moe_runtime.wire.executor import CountsReport
from moe_runtime.wire.messages import ExpertWork, RankResult


def monitor_of(ranks: CountingRanks) -> LoadMonitor:
    return LoadMonitor(ranks, ranks.shape, 10, 100)


def take(monitor: LoadMonitor, reports: Sequence[object]) -> list[Window]:
    windows = []
    for report in reports:
        assert isinstance(report, CountsReport)
        if (window := monitor.take_report(report)) is not None:
            windows.append(window)
    return windows


def test_a_window_is_what_happened_between_two_counts() -> None:
    ranks = CountingRanks()
    monitor = monitor_of(ranks)
    before = ranks.expert_counts()
    for steps in (3, 5):
        ranks.run(monitor.note_plan, steps)
        monitor.ask()
        assert monitor.is_waiting
        as_asked = ranks.expert_counts()
        ranks.run(monitor.note_plan, 2)  # steps that were not there yet when ranks were asked
        (window,) = take(monitor, ranks.reports())
        assert (window.counts_W2LE == as_asked - before).all()
        assert window.num_steps == steps + (2 if steps == 5 else 0)
        assert not monitor.is_waiting and monitor.steps_since == 2
        before = as_asked


def test_reports_of_two_times_are_never_mixed() -> None:
    ranks = CountingRanks()
    monitor = monitor_of(ranks)
    for _ in range(2):
        ranks.run(monitor.note_plan, 2)
        monitor.ask()
    # each rank answers in order, but both of rank 0's answers come before those of rank 1
    windows = take(monitor, sorted(ranks.reports(), key=lambda report: report.rank))
    assert [window.num_steps for window in windows] == [2, 2]
    assert (sum(window.counts_W2LE for window in windows) == ranks.expert_counts()).all()
    assert all((window.counts_W2LE >= 0).all() for window in windows)


def test_counts_that_come_after_later_ones_are_ignored() -> None:
    ranks = CountingRanks()
    monitor = monitor_of(ranks)
    ranks.run(monitor.note_plan, 3)
    monitor.ask()
    ranks.run(monitor.note_plan, 4)
    latest = ranks.expert_counts()
    window = monitor.take_counts(latest)
    assert window is not None and (window.counts_W2LE == latest).all() and window.num_steps == 7
    averages = monitor.averages.fast.copy()
    assert take(monitor, ranks.reports()) == []
    assert (monitor.total.counts_W2LE == latest).all() and (monitor.averages.fast == averages).all()
    assert not monitor.is_waiting
    assert monitor.take_counts(latest) is None, "no step since"


def test_averages_are_tokens_per_step_of_all_ranks() -> None:
    ranks = CountingRanks()
    monitor = monitor_of(ranks)
    ranks.run(monitor.note_plan, 6)
    monitor.take_counts(ranks.expert_counts())
    np.testing.assert_allclose(monitor.averages.fast, ranks.expert_counts().sum(axis=0) / 6)


def test_phases_of_steps_become_demand() -> None:
    counts = np.random.default_rng().integers(1, 90, (2, 2, 1, 3))
    window = Window(counts, num_steps=10, phase_steps=np.array([4, 8]), seconds=5.0)
    demand = window.demand(60.0)
    assert list(demand) == ["prefill", "decode"]
    np.testing.assert_allclose(demand["prefill"].rows, counts[:, 0].sum(axis=0) / 4)
    np.testing.assert_allclose(demand["decode"].rows, counts[:, 1].sum(axis=0) / 8)
    assert (demand["prefill"].num_steps, demand["decode"].num_steps) == (48, 96)
    assert list(Window(counts, 10, np.array([0, 8]), 5.0).demand(60.0)) == ["decode"]


def test_steps_are_counted_by_phase() -> None:
    ranks = CountingRanks()
    monitor = monitor_of(ranks)
    for number, (prefill, decode) in enumerate([(5, 0), (5, 2), (0, 2), (0, 3)]):
        monitor.note_plan(plan_of(number, prefill, decode))
    window = monitor.take_counts(ranks.expert_counts())
    assert window is not None and window.phase_steps.tolist() == [2, 3]


def test_layers_that_were_measured_give_the_cost_model() -> None:
    rng = np.random.default_rng()
    monitor = monitor_of(CountingRanks())
    assert monitor.layer_time() is None
    for step in range(MIN_SAMPLES):
        works = [
            [ExpertWork(touched, rows, 2e-5 * touched + 3e-6 * rows)]
            for touched, rows in zip(rng.integers(1, 9, 2).tolist(), rng.integers(1, 500, 2).tolist(), strict=True)
        ]
        results = [RankResult(step, rank, seconds=0.5, expert_work=work) for rank, work in enumerate(works)]
        monitor.note_results(results)
    layer_time = monitor.layer_time()
    assert layer_time is not None
    assert layer_time.seconds_per_slot == pytest.approx(2e-5, rel=0.05)
    assert layer_time.seconds_per_row == pytest.approx(3e-6, rel=0.05)
    assert 0 < monitor.step_seconds < 0.5
