from __future__ import annotations

import pytest
from fakes import make_engine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from moe_runtime.engine import engine as engine_module
from moe_runtime.engine.deadlines import Deadlines
from moe_runtime.engine.request import Request
from moe_runtime.types.sampling_params import SamplingParams

QUEUE_TIMEOUT = 5.0
LONG = SamplingParams(max_tokens=40, ignore_eos=True, seed=0)


class DeadlinesMachine(RuleBasedStateMachine):
    """The deadlines of requests in any state, beside a search through all of them."""

    def __init__(self):
        super().__init__()
        self.deadlines = Deadlines(QUEUE_TIMEOUT)
        self.requests = []
        self.now = 100.0
        self.num_requests = 0

    @rule(timeout=st.none() | st.sampled_from([1.0, 4.0, 5.0, 9.0]))
    def arrive(self, timeout):
        request = Request("", self.num_requests, [1], 1, SamplingParams(timeout=timeout), 0, 1, arrived_at=self.now)
        self.num_requests += 1
        self.requests.append(request)
        self.deadlines.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), ends=st.booleans())
    def start_or_end(self, data, ends):
        request = data.draw(st.sampled_from(self.requests))
        if ends:
            self.requests.remove(request)
            self.deadlines.remove(request)
        elif request.scheduled_at is None:
            request.scheduled_at = self.now

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    def wait(self, seconds):
        self.now += seconds
        expected = {}
        for request in self.requests:
            age, timeout = self.now - request.arrived_at, request.params.timeout
            if timeout is not None and age >= timeout:
                expected[request] = "timeout"
            elif request.scheduled_at is None and age >= QUEUE_TIMEOUT:
                expected[request] = "queue_timeout"
        found = {request: reason for request, reason, _ in self.deadlines.late(self.now)}
        assert found == expected
        self.requests = [request for request in self.requests if request not in found]


TestDeadlines = DeadlinesMachine.TestCase
TestDeadlines.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    return clock


def test_a_running_request_ends_with_the_tokens_that_it_has(clock):
    engine, _ = make_engine()
    engine.add_request("late", [5], SamplingParams(max_tokens=40, ignore_eos=True, timeout=2.5))
    engine.add_request("other", [5], LONG)
    for _ in range(3):
        engine.step()
    clock.now += 2.5
    (last,) = [delta for delta in engine.step() if delta.request_id == "late"]
    assert (last.finish_reason, last.token_ids, last.num_output_tokens) == ("timeout", [], 3)
    assert last.error == "timeout: the request has not ended within 2.5 s"
    while engine.has_work:
        assert all(delta.request_id == "other" for delta in engine.step())
    assert engine.stats().finished == {"timeout": 1, "length": 1}
    assert engine.stats().kv_cache_usage == 0


def test_a_waiting_request_leaves_the_queue_and_one_that_has_run_does_not(clock):
    engine, _ = make_engine(max_num_seqs=1, queue_timeout=QUEUE_TIMEOUT)
    engine.add_request("runs", [5], LONG)
    engine.add_request("waits", [5], LONG)
    engine.step()
    clock.now += QUEUE_TIMEOUT
    deltas = {delta.request_id: delta for delta in engine.step()}
    assert deltas["runs"].finish_reason is None
    assert (deltas["waits"].finish_reason, deltas["waits"].prompt_token_ids) == ("queue_timeout", [5])
    assert deltas["waits"].error == "the request has waited 5 s; try again later"


def test_time_counts_from_when_the_server_got_the_request(clock):
    engine, _ = make_engine()
    engine.add_request("a", [5], SamplingParams(timeout=10), arrived_at=clock.now - 10)
    (delta,) = engine.step()
    assert delta.finish_reason == "timeout" and not engine.has_work
