import json
from collections import Counter

import numpy as np
import pytest

from moe_runtime.balancer import Decision, Demand, LayerTime, MoveCost, Payback, Placement, plan_placement

PREFILL_TIME = LayerTime(seconds_per_slot=1e-6, seconds_per_row=1e-6)
DECODE_TIME = LayerTime(seconds_per_slot=100e-6, seconds_per_row=1e-7)
CHEAP = MoveCost(bytes_per_move=10**6, bytes_per_second=1e9)
EVEN = Placement.even(1, 8, 2)
SKEWED = np.array([[40.0, 30.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def decide(
    payback, rows=SKEWED, current=EVEN, steps=1000.0, time=PREFILL_TIME, cost=CHEAP, slots=5, is_new=False
) -> Decision:
    plans = []

    def make_plan():
        plans.append(plan_placement(rows, 2, slots, current))
        return plans[-1]

    decision = payback.decide(current, make_plan, {"prefill": Demand(rows, steps)}, time, cost, is_new=is_new)
    assert (decision.plan is not None) == bool(plans)
    return decision


def test_a_decision_in_words():
    """Figures that were not needed are left out, so no line says None."""
    moves, stays = str(decide(Payback(clock=Clock()))), str(decide(Payback(clock=Clock()), rows=SKEWED * 0))
    assert moves.startswith("experts move (pays back); balancedness 0.625, planned ") and " moves cost 0.00" in moves
    assert stays == "experts stay (no load); balancedness 1.000"


def test_a_move_that_pays_back_happens():
    decision = decide(Payback(clock=Clock()))
    assert decision.moves_experts
    assert decision.reason == "pays back"
    assert decision.at == 100
    assert decision.balancedness == pytest.approx(50 / 80)
    assert decision.planned_balancedness > 0.95
    assert decision.num_moves == len(decision.plan.moves) > 0
    assert decision.num_bytes == decision.num_moves * 10**6
    most = max(Counter(move.rank for move in decision.plan.moves).values())
    assert decision.cost_seconds == pytest.approx(most * 1e-3), "ranks copy side by side"
    assert decision.saving_seconds == pytest.approx(decision.sparse_seconds - decision.planned_sparse_seconds)
    assert decision.saving_seconds > decision.margin * decision.cost_seconds
    assert decision.horizon_steps == 1000
    figures = json.loads(json.dumps(decision.to_dict()))
    assert "plan" not in figures
    assert figures["reason"] == "pays back"


def test_the_saving_must_exceed_the_cost_by_the_margin():
    saving = decide(Payback(clock=Clock())).saving_seconds
    moves = decide(Payback(clock=Clock())).num_moves
    for factor, moves_experts in ((0.99, True), (1.01, False)):
        cost = MoveCost(bytes_per_move=0, bytes_per_second=1.0, stall_seconds=factor * saving / 2)
        decision = decide(Payback(margin=2, clock=Clock()), cost=cost)
        assert decision.moves_experts == moves_experts
        assert decision.num_moves == moves
    assert decision.reason == "does not pay back"
    assert decide(Payback(clock=Clock()), steps=1.0).reason == "does not pay back"


def test_decode_may_be_better_without_replicas():
    """Few rows per step: every replica is read in every step, and the reading is what takes the time."""
    rows = np.array([[9.0, 8.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    decision = decide(Payback(clock=Clock()), rows=rows, time=DECODE_TIME, steps=1e6)
    assert decision.num_moves > 0
    assert decision.planned_balancedness > decision.balancedness
    assert (decision.moves_experts, decision.reason) == (False, "slower")
    assert decision.saving_seconds < 0


def test_new_load_moves_nothing_until_it_stays():
    payback = Payback(clock=Clock())
    decision = decide(payback, is_new=True)
    assert (decision.moves_experts, decision.reason) == (False, "new load")
    assert decision.plan is None and decision.balancedness == pytest.approx(50 / 80)
    assert decide(payback, rows=np.ones((1, 8)), is_new=True).reason == "balanced"
    assert decide(payback).moves_experts


def test_a_move_waits_for_as_much_saving_as_it_costs():
    """The horizon is how long the load has lasted, so steps add up until they pay."""
    clock = Clock()
    payback, steps = Payback(margin=1.5, clock=clock), 0
    cost = MoveCost(bytes_per_move=10**7, bytes_per_second=1e9)
    while not (decision := decide(payback, steps=(steps := steps + 50), cost=cost)).moves_experts:
        assert decision.reason == "does not pay back"
        assert decision.saving_seconds <= 1.5 * decision.cost_seconds
        clock.now += 1
    assert 1.5 * decision.cost_seconds < decision.saving_seconds < 3 * decision.cost_seconds
    assert decision.at == clock.now > 100


def rows_with(balancedness):
    """Two ranks of four experts each, of which the first has the more load."""
    rows = np.full((1, 8), 250 * (2 * balancedness - 1))
    rows[0, :4] = 250
    return rows


def test_hysteresis():
    payback = Payback(start_below=0.8, stop_above=0.9, clock=Clock())
    reasons = [decide(payback, rows=rows_with(x), slots=4).reason for x in (0.85, 0.75, 0.85, 0.95, 0.85)]
    assert reasons == ["balanced", "pays back", "pays back", "balanced", "balanced"]


def test_no_load_and_nothing_to_move():
    assert decide(Payback(clock=Clock()), rows=np.zeros((1, 8))).reason == "no load"
    one = np.zeros((1, 8))
    one[0, 3] = 7
    # with no spare slot nothing helps one expert that takes everything
    assert decide(Payback(clock=Clock()), rows=one, slots=4).reason == "nothing to move"


def test_phases_add_up():
    payback = Payback(clock=Clock())
    plan = plan_placement(SKEWED, 2, 5, EVEN)
    demand = {"prefill": Demand(SKEWED * 100, 3.0), "decode": Demand(SKEWED / 10, 500.0)}
    decision = payback.decide(EVEN, lambda: plan, demand, PREFILL_TIME, CHEAP)
    expected = sum(phase.num_steps * PREFILL_TIME.step_seconds(phase.rows, EVEN) for phase in demand.values())
    assert decision.sparse_seconds == pytest.approx(expected)
    assert decision.horizon_steps == 503


def test_speeds_count():
    decision = Payback(clock=Clock()).decide(
        EVEN,
        lambda: plan_placement(np.ones((1, 8)), 2, 5, EVEN, [1.5, 0.5]),
        {"prefill": Demand(np.full((1, 8), 100.0), 1e4)},
        PREFILL_TIME,
        CHEAP,
        rank_speed=[1.5, 0.5],
    )
    assert decision.balancedness == pytest.approx(0.5)
    assert decision.moves_experts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Payback(margin=0.5), "margin: 0.5 is not allowed"),
        (lambda: Payback(start_below=0.9, stop_above=0.8), "start_below: 0.9 with stop_above 0.8 is not allowed"),
        (lambda: MoveCost(-1, 1.0), "bytes_per_move: -1 is not allowed"),
        (lambda: MoveCost(1, 0.0), "bytes_per_second: 0.0 is not allowed"),
        (lambda: MoveCost(1, 1.0, np.inf), "stall_seconds: inf is not allowed"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
