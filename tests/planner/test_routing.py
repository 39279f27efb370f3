"""The planner's routings: which experts a step's tokens use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.balancer.trace import UNUSED, RoutingTrace
from moe_runtime.planner.routing import LoadRouting, TraceRouting, chosen_layers


def make_trace(rng, num_tokens=60, num_layers=3, num_experts=7, top_k=2, decode=0.5) -> RoutingTrace:
    chosen = np.argsort(rng.random((num_tokens, num_layers, num_experts)), axis=2)[:, :, :top_k]
    return RoutingTrace(
        experts=chosen.astype(np.uint16),
        step=np.sort(rng.integers(0, 9, num_tokens)).astype(np.int32),
        rank=np.zeros(num_tokens, np.uint16),
        is_decode=rng.random(num_tokens) < decode,
        num_experts=num_experts,
        layer_ids=tuple(range(num_layers)),
        model="m",
        top_k=top_k,
    )


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.data())
def test_loads_become_probabilities_that_add_up_to_top_k(seed, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    rng = np.random.default_rng(seed)
    routing = LoadRouting(rng.gamma(0.3, 1, (2, num_experts)), top_k)
    probability = routing.plan_load
    assert ((probability >= 0) & (probability <= 1)).all()
    np.testing.assert_allclose(probability.sum(axis=1), top_k, rtol=1e-4)


def test_an_expert_with_more_load_is_used_more():
    load = np.array([[8.0, 4.0, 2.0, 1.0, 0.0]])
    probability = LoadRouting(load, 2).plan_load[0]
    assert (np.diff(probability) < 0).all() and probability[-1] < 1e-5


def test_measured_loads_are_kept_in_proportion():
    count = np.array([[30, 20, 10]])
    np.testing.assert_allclose(LoadRouting(count, 2, exact=True).plan_load, [[1.0, 2 / 3, 1 / 3]])


def test_counts_follow_the_probabilities_and_are_the_same_again():
    routing = LoadRouting(np.random.default_rng(5).gamma(1, 1, (2, 30)), 4, seed=3)
    counts = routing.counts(1, 100_000, 0)
    np.testing.assert_allclose(counts / 100_000, routing.plan_load[1], atol=0.01)
    assert (counts == routing.counts(1, 100_000, 0)).all() and (counts != routing.counts(1, 100_000, 1)).any()


def test_hits_are_those_of_drawn_tokens():
    routing = LoadRouting(np.random.default_rng(6).gamma(1, 1, (1, 12)), 3)
    probability = routing.plan_load[0]
    rank_E = np.arange(12) % 3
    share_EW = np.eye(3)[rank_E]
    used = np.random.default_rng(7).random((200_000, 12)) < probability
    hit = np.stack([used[:, rank_E == rank].any(axis=1).mean() for rank in range(3)])
    np.testing.assert_allclose(routing.hits(0, share_EW), hit, atol=0.005)


@pytest.mark.parametrize("what", ["", "zipf", "zipf:", "zipf:x", "zipf:-1", "zipf:nan", "zipf:11", "flat", "uniform:1"])
def test_an_unknown_assumption_is_refused(what):
    with pytest.raises(ValueError, match=r"assume: .* is not allowed; it must be"):
        LoadRouting.assume(what, 8, 2)


def test_top_k_beyond_the_experts_is_refused():
    with pytest.raises(ValueError, match="top_k: 9 is not allowed"):
        LoadRouting.assume("uniform", 8, 9)


def test_a_trace_is_planned_for_its_first_half_and_replays_the_second():
    rng = np.random.default_rng(0)
    trace = make_trace(rng, decode=1.0)
    routing = TraceRouting(trace, "decode")
    first, second = trace.experts[:30], trace.experts[30:]
    for layer in range(3):
        assert (routing.plan_load[layer] == np.bincount(first[:, layer].ravel(), minlength=7)).all()
        whole = np.bincount(second[:, layer].ravel(), minlength=7)
        for draw in range(4):
            assert (routing.counts(layer, 60, draw) == 2 * whole).all()
            assert routing.counts(layer, 5, draw).sum() == 10
    assert not all((routing.counts(0, 5, 0) == routing.counts(0, 5, draw)).all() for draw in range(1, 4))


def test_unused_places_of_a_trace_count_nowhere():
    rng = np.random.default_rng(1)
    trace = make_trace(rng, decode=1.0)
    experts = trace.experts.copy()
    experts[:, :, 1] = UNUSED
    routing = TraceRouting(
        RoutingTrace(experts, trace.step, trace.rank, trace.is_decode, 7, trace.layer_ids, "m", 2), "decode"
    )
    assert routing.counts(0, 30, 0).sum() == 30
    hits = routing.hits(0, np.eye(7))
    np.testing.assert_allclose(hits.sum(), 1.0)


def test_only_the_phase_that_is_asked_for():
    trace = make_trace(np.random.default_rng(2))
    for phase, number in (("decode", trace.is_decode.sum()), ("prefill", (~trace.is_decode).sum())):
        assert TraceRouting(trace, phase).num_tokens == number - number // 2
    prompts = make_trace(np.random.default_rng(3), decode=0.0)
    with pytest.raises(ValueError, match="trace: 0 tokens of phase 'decode' are not allowed"):
        TraceRouting(prompts, "decode")


def test_chosen_layers_begin_and_end_with_the_models():
    assert chosen_layers(3).tolist() == [0, 1, 2]
    many = chosen_layers(100)
    assert len(many) == 16 and many[0] == 0 and many[-1] == 99
