from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moe_runtime.engine import waiting
from moe_runtime.engine.keyed_heap import KeyedHeap
from moe_runtime.engine.request import Request
from moe_runtime.engine.waiting import OLDEST_EVERY, Waiting
from moe_runtime.types.sampling_params import SamplingParams

USERS = ("", "ann", "bob", "eve")
PRIORITIES = (-3, 0, 7)


def make_request(seq_id: int, user: str = "", priority: int = 0) -> Request:
    return Request(str(seq_id), seq_id, [1], 1, SamplingParams(priority=priority), 0, 1, user=user)


class HeapMachine(RuleBasedStateMachine):
    """A heap and a dict."""

    def __init__(self):
        super().__init__()
        self.heap = KeyedHeap()
        self.model = {}

    @rule(item=st.integers(0, 9), key=st.integers(0, 5))
    def set(self, item, key):
        self.heap.set(item, key)
        self.model[item] = key

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data):
        item = data.draw(st.sampled_from(sorted(self.model)))
        self.heap.remove(item)
        del self.model[item]

    @invariant()
    def same(self):
        assert sorted(self.heap) == sorted(self.model) and len(self.heap) == len(self.model)
        expected = min(self.model, key=lambda item: (self.model[item], item)) if self.model else None
        assert self.heap.first() == expected
        assert all(self.heap.key(item) == key for item, key in self.model.items())


class SlowWaiting:
    """The rules of `Waiting`, as they are written down: everything is searched for."""

    def __init__(self):
        self.requests = []
        self.tokens = {}  # (priority, user) -> tokens
        self.began = {}  # (priority, user) -> when it began to wait
        self.clock = self.num_admitted = 0

    def users(self, priority):
        return {request.user for request in self.requests if request.params.priority == priority}

    def least(self, priority):
        return min((self.tokens[priority, user] for user in self.users(priority)), default=0)

    def add(self, request):
        key = priority, user = request.params.priority, request.user
        if user not in self.users(priority):
            self.tokens[key] = max(self.tokens.get(key, 0), self.least(priority))
            self.began[key] = self.clock = self.clock + 1
        self.requests.append(request)

    def remove(self, request):
        self.requests.remove(request)
        if not self.users(request.params.priority):
            self.tokens = {key: value for key, value in self.tokens.items() if key[0] != request.params.priority}

    def charge(self, priority, user, num_tokens):
        if users := self.users(priority):
            before = self.tokens.get((priority, user), 0)
            if user not in users:
                before = max(before, self.least(priority))
            self.tokens[priority, user] = before + num_tokens

    def next(self):
        if not self.requests:
            return None
        if (self.num_admitted + 1) % OLDEST_EVERY == 0:
            return min(self.requests, key=lambda request: request.seq_id)
        priority = min(request.params.priority for request in self.requests)
        user = min(self.users(priority), key=lambda user: (self.tokens[priority, user], self.began[priority, user]))
        theirs = [request for request in self.requests if (request.params.priority, request.user) == (priority, user)]
        return min(theirs, key=lambda request: request.seq_id)


class WaitingMachine(RuleBasedStateMachine):
    """Any order of arrivals, admissions, preemptions, ends and computed tokens, beside the slow model."""

    def __init__(self):
        super().__init__()
        self.waiting, self.model = Waiting(), SlowWaiting()
        self.running = []
        self.num_requests = 0
        self.admissions_left = {}  # of each that waits, by the bound that the module promises

    @rule(user=st.sampled_from(USERS), priority=st.sampled_from(PRIORITIES))
    def arrive(self, user, priority):
        request = make_request(self.num_requests, user, priority)
        self.num_requests += 1
        self.add(request)

    def add(self, request):
        for other, left in self.admissions_left.items():
            if other.seq_id > request.seq_id:  # one more that is older
                self.admissions_left[other] = left + OLDEST_EVERY
        older = sum(other.seq_id < request.seq_id for other in self.model.requests)
        self.admissions_left[request] = OLDEST_EVERY * (older + 1)
        self.waiting.add(request)
        self.model.add(request)

    @precondition(lambda self: self.model.requests)
    @rule(num_tokens=st.integers(1, 50))
    def admit(self, num_tokens):
        request = self.waiting.next()
        self.waiting.admit(request)
        self.model.remove(request)
        self.model.num_admitted += 1
        del self.admissions_left[request]
        self.admissions_left = {other: left - 1 for other, left in self.admissions_left.items()}
        self.running.append(request)
        self.charge(request, num_tokens)

    def charge(self, request, num_tokens):
        self.waiting.charge(request, num_tokens)
        self.model.charge(request.params.priority, request.user, num_tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 9))
    def compute(self, data, num_tokens):
        self.charge(data.draw(st.sampled_from(self.running)), num_tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), preempted=st.booleans())
    def leave(self, data, preempted):
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        if preempted:
            self.add(request)

    @precondition(lambda self: self.model.requests)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.model.requests))
        self.waiting.remove(request)
        self.model.remove(request)
        del self.admissions_left[request]

    @invariant()
    def same(self):
        assert self.waiting.next() is self.model.next()
        assert list(self.waiting) == sorted(self.model.requests, key=lambda request: request.seq_id)
        assert len(self.waiting) == len(self.model.requests)

    @invariant()
    def nothing_starves(self):
        assert all(left > 0 for left in self.admissions_left.values())


TestHeap = HeapMachine.TestCase
TestHeap.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestWaiting = WaitingMachine.TestCase
TestWaiting.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)


def admitted(queue: Waiting, count: int, num_tokens=lambda request: 10) -> list[Request]:
    found = []
    for _ in range(count):
        request = queue.next()
        queue.admit(request)
        queue.charge(request, num_tokens(request))
        found.append(request)
    return found


def test_a_stream_of_urgent_requests_does_not_starve_another():
    queue = Waiting()
    queue.add(make_request(0, priority=10**9))
    order = []
    for seq_id in range(1, 20):
        queue.add(make_request(seq_id))
        order += admitted(queue, 1)
    assert order.index(min(order, key=lambda request: request.seq_id)) == OLDEST_EVERY - 1
    assert [request.seq_id for request in order if request.seq_id] == list(range(1, 19)), "else in order of arrival"


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=3))
def test_users_get_equal_tokens_whatever_the_size_of_their_requests(sizes):
    queue = Waiting()
    cost = {str(number): size for number, size in enumerate(sizes)}
    for seq_id in range(3000):
        queue.add(make_request(seq_id, str(seq_id % len(sizes))))
    got = dict.fromkeys(cost, 0)
    for request in admitted(queue, 1000, lambda request: cost[request.user]):
        got[request.user] += cost[request.user]
    # Who costs most gets more than a share only by age, which is one admission in OLDEST_EVERY.
    by_age = max(sizes) * 1000 / OLDEST_EVERY
    assert max(got.values()) <= max(by_age, sum(got.values()) / len(sizes)) + 2 * OLDEST_EVERY * max(sizes)


def test_nobody_saves_up_turns():
    queue = Waiting()
    for seq_id in range(100):
        queue.add(make_request(seq_id, "busy"))
    admitted(queue, 50)
    for seq_id in range(100, 110):
        queue.add(make_request(seq_id, "new"))
    users = [request.user for request in admitted(queue, 10)]
    assert users.count("new") == 5


def test_a_user_who_hangs_up_pays_nothing_for_what_was_not_computed():
    queue = Waiting()
    for seq_id in range(40):
        queue.add(make_request(seq_id, "bob" if seq_id % 2 else "ann"))
    for request in [request for request in queue if request.user == "bob"]:
        queue.remove(request)
    queue.add(make_request(100, "bob"))
    assert "bob" in [request.user for request in admitted(queue, 2)]


def test_the_memory_of_users_is_bounded(monkeypatch):
    monkeypatch.setattr(waiting, "MAX_IDLE_USERS", 8)
    queue = Waiting()
    queue.add(make_request(0, "stays", priority=0))
    for seq_id in range(1, 200):
        request = make_request(seq_id, f"user {seq_id}")
        queue.add(request)
        queue.remove(request)
        queue.charge(request, random.randrange(10))
    (level,) = queue._levels.values()
    assert len(level._idle) == 8 and len(level._users._heap) < 40


@pytest.mark.parametrize("count", [1000])
def test_the_heap_is_swept(count):
    heap = KeyedHeap()
    heap.set(0, 0)
    for key in range(count):
        heap.set(1, key + 1)
    assert len(heap._heap) < 30 and heap.first() == 0


def test_requests_that_are_set_aside_lose_no_turn():
    queue = Waiting()
    ann, bob, other = make_request(0, "ann"), make_request(1, "bob"), make_request(2, "ann", priority=7)
    for request in (ann, bob, other):
        queue.add(request)
    queue.charge(bob, 5)
    queue.set_aside(ann)
    assert queue.next() is bob and len(queue) == 2
    queue.set_aside(bob)
    assert queue.next() is other, "a priority of which nobody is left is passed over"
    queue.set_aside(other)
    assert queue.next() is None
    for request in (bob, ann, other):
        queue.put_back(request)
    order = []
    while (request := queue.next()) is not None:
        order.append(request)
        queue.admit(request)
    assert order == [ann, bob, other], "ann has had fewer tokens than bob"
