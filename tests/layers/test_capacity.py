"""Capacity and load-aware experts of one rank against slow twins, and what they leave unchanged."""

from __future__ import annotations

import capacity_twins as twins
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime.all2all.rounds import counts_of, num_rounds, place_among_equals
from moe_runtime.config.limits import Limits
from moe_runtime.config.model import MoEConfig
from moe_runtime.kernels import torch_ops
from moe_runtime.layers.batch import Batch, StepLimits, StepPolicies
from moe_runtime.layers.capacity import (
    LayerLimits,
    drop,
    over_capacity,
    prefer_light_ranks,
    rank_of_experts,
    reroute,
)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Choices `[T, E]`, some equal, some impossible, and experts `[T, K]` of them, some dropped by a policy."""
    num_experts = draw(st.integers(2, 9))
    top_k = draw(st.integers(1, min(4, num_experts)))
    num_tokens = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([2, 1000]))
    skew = torch.arange(num_experts) * draw(st.sampled_from([0.0, 1.0]))
    choice_TE = (torch.randint(levels, (num_tokens, num_experts), generator=generator) / levels + skew).float() + 0.01
    experts_TK = choice_TE.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    if draw(st.booleans()):
        experts_TK = experts_TK.masked_fill(torch.rand(experts_TK.shape, generator=generator) < 0.2, -1)
    if draw(st.booleans()):  # groups that are not kept
        hidden_TE = torch.rand(choice_TE.shape, generator=generator) < 0.4
        hidden_TE.scatter_(1, experts_TK.clamp(min=0), False)
        choice_TE = choice_TE.masked_fill(hidden_TE, -torch.inf)
    return choice_TE, experts_TK


@settings(deadline=None)
@given(st.lists(st.integers(-1, 5)), st.integers(6, 8))
def test_places_count_the_equal_values_before(values: list[int], num_values: int) -> None:
    found = place_among_equals(torch.tensor(values, dtype=torch.int64), num_values)
    assert found.tolist() == [values[:index].count(value) for index, value in enumerate(values)]
    assert counts_of(torch.tensor(values, dtype=torch.int64), num_values).tolist() == [
        values.count(value) for value in range(num_values)
    ]


def test_rounds_follow_the_fullest_slot_of_any_rank() -> None:
    counts_WG = torch.tensor([[3, 0, 4], [9, 1, 0]])
    assert num_rounds(counts_WG, torch.tensor([2, 9])) == 2
    assert num_rounds(counts_WG, torch.tensor([4, 2])) == 5
    assert num_rounds(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, 1])) == 1


@pytest.mark.parametrize(
    ("factor", "num_tokens", "top_k", "num_experts", "expected"),
    [(1.0, 10, 2, 8, 3), (2.0, 10, 2, 8, 5), (0.01, 10, 2, 8, 1), (1e308, 10, 2, 8, 10), (1.0, 0, 2, 8, 1)],
)
def test_capacity(factor: float, num_tokens: int, top_k: int, num_experts: int, expected: int) -> None:
    assert Limits(factor).capacity(num_tokens, top_k, num_experts) == expected


@settings(deadline=None)
@given(routings(), st.integers(1, 12))
def test_drop_is_its_twin(routing: tuple[Tensor, Tensor], room: int) -> None:
    choice_TE, experts_TK = routing
    over_TK = over_capacity(experts_TK, choice_TE.shape[1], room)
    assert over_TK.tolist() == twins.over_capacity(experts_TK.tolist(), room)
    kept_TK, dropped_T = drop(experts_TK, choice_TE.shape[1], room)
    assert (kept_TK.tolist(), dropped_T.tolist()) == twins.drop(experts_TK.tolist(), room)


@settings(deadline=None)
@given(routings(), st.integers(1, 12))
def test_reroute_is_its_twin(routing: tuple[Tensor, Tensor], room: int) -> None:
    choice_TE, experts_TK = routing
    placed_TK, rerouted_T, dropped_T = reroute(choice_TE, experts_TK, room)
    expected = twins.reroute(choice_TE.tolist(), experts_TK.tolist(), room)
    assert (placed_TK.tolist(), rerouted_T.tolist(), dropped_T.tolist()) == expected
    used = placed_TK[placed_TK >= 0]
    assert (counts_of(used, choice_TE.shape[1]) <= room).all()
    assert all(len(set(row)) == len(row) for row in ([e for e in row if e >= 0] for row in placed_TK.tolist()))
    assert torch.equal((experts_TK >= 0).sum(1), (placed_TK >= 0).sum(1) + dropped_T)


@settings(deadline=None)
@given(routings(), st.data())
def test_preferring_light_ranks_is_its_twin(routing: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    choice_TE, experts_TK = routing
    num_experts, num_ranks = choice_TE.shape[1], data.draw(st.integers(2, 4))
    rank_of = data.draw(st.lists(st.integers(-1, num_ranks - 1), min_size=num_experts, max_size=num_experts))
    rows = data.draw(st.lists(st.integers(0, 50).map(float), min_size=num_ranks, max_size=num_ranks))
    epsilon = data.draw(st.sampled_from([0.01, 0.3, 0.99]))
    scores_TE = choice_TE.masked_fill(choice_TE == -torch.inf, 0.001)
    rows_W = torch.tensor(rows, dtype=torch.float64)
    found_TK, moved_T = prefer_light_ranks(scores_TE, choice_TE, experts_TK, torch.tensor(rank_of), rows_W, epsilon)
    expected = twins.prefer_light_ranks(
        scores_TE.tolist(), choice_TE.tolist(), experts_TK.tolist(), rank_of, rows, epsilon
    )
    assert (found_TK.tolist(), moved_T.tolist()) == expected


def test_what_is_not_a_number_is_dropped_or_left() -> None:
    choice_TE = torch.full((3, 4), torch.nan)
    experts_TK = torch.tensor([[0, 1]] * 3)
    placed_TK, rerouted_T, dropped_T = reroute(choice_TE, experts_TK, 1)
    assert placed_TK.tolist() == [[0, 1], [-1, -1], [-1, -1]]
    assert (rerouted_T.tolist(), dropped_T.tolist()) == ([0, 0, 0], [0, 2, 2])
    rows_W = torch.tensor([9.0, 1.0], dtype=torch.float64)
    left_TK, moved_T = prefer_light_ranks(choice_TE, choice_TE, experts_TK, torch.tensor([0, 0, 1, 1]), rows_W, 0.9)
    assert left_TK.tolist() == experts_TK.tolist() and not moved_T.any()


def test_experts_with_replicas_have_no_rank() -> None:
    slot_EP = torch.tensor([[0, 0, 0, 0], [1, 4, 1, 4], [5, 5, 5, 5]])
    assert rank_of_experts(slot_EP, 3).tolist() == [0, -1, 1]


GATES = {
    "softmax": MoEConfig(num_experts=8, top_k=3, intermediate_size=1, normalize_topk=False),
    "softmax, normalised": MoEConfig(num_experts=8, top_k=3, intermediate_size=1),
    "sigmoid, groups": MoEConfig(
        num_experts=8,
        top_k=3,
        intermediate_size=1,
        scoring="sigmoid",
        num_groups=4,
        topk_groups=2,
        routed_scaling_factor=1.7,
    ),
}


def run(limits: Limits, config: MoEConfig, logits_TE: Tensor, bias_E: Tensor | None, rank_rows: list[list[float]]):
    """`LayerLimits.choose` of two ranks with four slots each, and all that it writes."""
    options = {
        "top_k": config.top_k,
        "scoring": config.scoring,
        "correction_bias_E": bias_E,
        "num_groups": config.num_groups,
        "topk_groups": config.topk_groups,
        "normalize": config.normalize_topk,
        "scale": config.routed_scaling_factor,
    }
    weights_TK, experts_TK = torch_ops.topk_gate(logits_TE, **options)
    counts_2E = torch.zeros(2, 8, dtype=torch.int64)
    chosen_LTK = torch.full((2, *experts_TK.shape), 99, dtype=torch.int16)
    rows_LW = torch.tensor(rank_rows, dtype=torch.float64).T if rank_rows else None
    step = StepLimits(rows_LW, torch.zeros(len(logits_TE), 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    empty = torch.empty(0, dtype=torch.int64)
    routing = StepPolicies(chosen_LTK=chosen_LTK)
    batch = Batch(empty, empty, (), 5, "local", [len(logits_TE)], policies=routing, limits=step)
    layer = LayerLimits(limits, config, bias_E, counts_2E, 1, 4)
    found = layer.choose(logits_TE, weights_TK, experts_TK, torch.arange(8)[:, None].repeat(1, 4), batch)
    assert torch.equal(chosen_LTK[1].long(), found[1]) and (chosen_LTK[0] == 99).all()
    for phase, rows in ((1, found[1][:5]), (0, found[1][5:])):
        assert torch.equal(counts_2E[phase], torch.bincount(rows[rows >= 0], minlength=8))
    return (weights_TK, experts_TK), found, step.changes_T3


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("overflow", ["reroute", "drop", "moved"])
def test_weights_are_those_of_the_gate_over_what_is_left(gate: str, overflow: str) -> None:
    config = GATES[gate]
    logits_TE = torch.randn(40, 8) + torch.linspace(0.3, -0.3, 8)
    bias_E = torch.randn(8) * 0.1 if config.scoring == "sigmoid" else None
    limits = Limits(None, "queue", 0.9) if overflow == "moved" else Limits(1.0, overflow, None)
    before, (weights_TK, experts_TK), changes_T3 = run(limits, config, logits_TE, bias_E, [[0, 90], [0, 10]])
    same_T = (experts_TK == before[1]).all(1)
    assert 0 < same_T.sum() < 40
    assert torch.equal(weights_TK[same_T], before[0][same_T])
    scores_TE = logits_TE.softmax(-1) if config.scoring == "softmax" else logits_TE.sigmoid()
    for token in range(40):
        used = [e for e in experts_TK[token].tolist() if e >= 0]
        total = scores_TE[token, used].sum() if config.normalize_topk else 1.0
        for weight, expert in zip(weights_TK[token], experts_TK[token].tolist(), strict=True):
            exact = scores_TE[token, expert] / total * config.routed_scaling_factor if expert >= 0 else 0.0
            assert weight.item() == pytest.approx(float(exact), rel=1e-5)
    columns = {"moved": 0, "reroute": 1, "drop": 2}
    assert changes_T3[:, columns[overflow]].sum() > 0
    assert (changes_T3.sum(1) > 0).tolist() == (~same_T).tolist()
    if config.num_groups > 1:  # a token stays in the groups that its gate keeps
        groups = [{e // 2 for e in row if e >= 0} for row in experts_TK.tolist()]
        assert all(len(found) <= 2 for found in groups)


def test_with_room_for_all_nothing_changes() -> None:
    for limits in (Limits(8.0, "reroute", None), Limits(8.0, "drop", None), Limits(None, "queue", 0.5)):
        before, found, changes_T3 = run(limits, GATES["softmax"], torch.randn(20, 8), None, [])
        assert torch.equal(found[0], before[0]) and torch.equal(found[1], before[1]) and not changes_T3.any()


def test_a_balanced_load_moves_nothing() -> None:
    before, found, _ = run(Limits(None, "queue", 0.9), GATES["softmax"], torch.randn(20, 8), None, [[7, 7], [7, 7]])
    assert torch.equal(found[1], before[1])
