from __future__ import annotations

import pytest
from fakes import make_engine
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.engine.overload import OverloadRouting
from moe_runtime.types.expert_policy import ExpertPolicy
from moe_runtime.types.sampling_params import SamplingParams

POLICY = ExpertPolicy(top_k=1)
OPTIONS = {"max_num_seqs": 1, "overload_routing": {"threshold": 0.5}, "overload_queue": (2, 1), "ep_size": 1}


@given(high=st.integers(0, 9), low=st.integers(0, 9), lengths=st.lists(st.integers(0, 12)))
def test_begins_above_the_first_length_and_ends_below_the_second(high, low, lengths):
    high, low = max(high, low), min(high, low)
    overload = OverloadRouting("fast", POLICY, (high, low))
    was_active = False
    for length in lengths:
        overload.note(length)
        if overload.is_active != was_active:
            assert length > high if overload.is_active else length < low
        elif not was_active:
            assert length <= high
        was_active = overload.is_active


def run(engine):
    """The last deltas and the policies that ranks got, by request."""
    last = {}
    while engine.has_work:
        last |= {delta.request_id: delta for delta in engine.step() if delta.finish_reason}
    return last


def test_requests_of_a_long_queue_get_the_policy_and_say_so():
    engine, executor = make_engine(**OPTIONS)
    for index in range(6):
        engine.add_request(str(index), [5], SamplingParams(max_tokens=2, ignore_eos=True))
    last = run(engine)
    # 0 finds an empty queue; 1 to 5 then wait. Of them 1 to 4 are admitted while the queue is not yet shorter than 1.
    lowered = {request_id: delta.overload_routing for request_id, delta in last.items()}
    assert lowered == {"0": None} | dict.fromkeys("12345", "threshold=0.5")
    policies = [new.params.routing for plan in executor.plans for new in plan.ranks[0].new_sequences]
    assert policies == [None] + [ExpertPolicy(threshold=0.5)] * 5
    assert engine.stats().overload.num_requests == 5 and not engine.stats().overload.is_active


@pytest.mark.parametrize("routing", ["full", "top_k=1"])
def test_a_request_that_sets_its_experts_keeps_them(routing):
    engine, executor = make_engine(**OPTIONS)
    for index in range(5):
        engine.add_request(str(index), [5], SamplingParams(max_tokens=2, ignore_eos=True, routing=routing))
    assert {delta.overload_routing for delta in run(engine).values()} == {None}
    (policy,) = {new.params.routing for plan in executor.plans for new in plan.ranks[0].new_sequences}
    assert policy == (None if routing == "full" else POLICY)


def test_a_preempted_request_keeps_its_policy():
    """Page pressure makes requests come back while the queue is long; none changes its policy on the way."""
    engine, executor = make_engine([10], **OPTIONS | {"max_num_seqs": 4})
    for index in range(12):
        engine.add_request(str(index), [5] * 9, SamplingParams(max_tokens=25, ignore_eos=True))
    run(engine)
    assert engine.stats().num_preemptions
    policies = {}
    for plan in executor.plans:
        for new in plan.ranks[0].new_sequences:
            assert policies.setdefault(new.seq_id, new.params.routing) == new.params.routing
    assert len(set(policies.values())) == 2


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("full", "^overload_routing: 'full' is not allowed; it must use fewer experts than the model$"),
        ("fast", "^overload_routing: 'fast' is not allowed for this model; it needs a file of `moe-runtime calibrate`"),
        ("top_k=9", "^overload_routing.top_k: 9 is not allowed; the model uses 1 experts per token$"),
    ],
)
def test_policies_that_the_model_cannot_take(policy, message):
    with pytest.raises(ValueError, match=message):
        make_engine(overload_routing=policy)
