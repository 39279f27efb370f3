"""The bound of the queue: the count beside a simulated engine, and what clients see."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from serve_clients import client_of, events_of, run, started
from serve_fakes import DEADLINE, FakeEngine, wait_until

from moe_runtime.config.engine import EngineConfig
from moe_runtime.serve.admission import Admission, QueueFullError
from moe_runtime.serve.async_engine import AsyncEngine

MAX_QUEUE, MAX_RUNNING = 4, 3


class AdmissionMachine(RuleBasedStateMachine):
    """Clients, an engine that takes requests between its steps, and messages that are on their way."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.admission = Admission(MAX_QUEUE, MAX_RUNNING, lambda: self.now)
        self.to_engine = self.waiting = self.running = self.num_admitted = 0
        self.to_front = []

    @property
    def outside(self):
        """Requests that were taken and do not run."""
        return self.to_engine + self.waiting

    @rule(count=st.integers(1, 3))
    def ask(self, count):
        before = self.outside
        try:
            self.admission.check()
        except QueueFullError as error:
            if not self.to_front:  # all that the engine has done is known
                assert before >= MAX_QUEUE, "refused although there is room"
            assert 1 <= error.retry_after <= 60
            return
        for _ in range(count):
            self.admission.sent()
        self.to_engine += count

    @precondition(lambda self: self.to_engine)
    @rule(data=st.data(), refuses=st.booleans())
    def engine_takes(self, data, refuses):
        count = data.draw(st.integers(1, self.to_engine))
        self.to_engine -= count
        if refuses:
            self.to_front += ["refused"] * count
        else:
            self.waiting += count
            self.to_front += ["accepted"] * count

    @rule(data=st.data(), seconds=st.sampled_from([0.0, 0.3, 2.0]))
    def engine_steps(self, data, seconds):
        self.running -= data.draw(st.integers(0, self.running))
        taken = min(self.waiting, MAX_RUNNING - self.running)
        self.waiting -= taken
        self.running += taken
        self.num_admitted += taken
        self.now += seconds
        self.to_front.append(
            SimpleNamespace(num_waiting=self.waiting, num_running=self.running, num_admitted=self.num_admitted)
        )

    @rule(data=st.data())
    def front_reads(self, data):
        count = data.draw(st.integers(0, len(self.to_front)))
        for event in self.to_front[:count]:
            if event == "accepted":
                self.admission.accepted()
            elif event == "refused":
                self.admission.refused()
            else:
                self.admission.note(event)
        del self.to_front[:count]

    @invariant()
    def the_queue_is_bounded(self):
        # One request may have two choices too many, and all slots may be empty when the last report was written.
        assert self.outside <= MAX_QUEUE + MAX_RUNNING + 2

    @invariant()
    def the_count_is_exact_once_everything_has_arrived(self):
        if not self.to_front:
            not_reported = self.admission._num_accepted
            assert self.admission.num_waiting >= self.to_engine
            assert self.admission.num_waiting == self.outside or not_reported or self.running


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


def test_retry_after_follows_the_measured_rate():
    now = 0.0
    admission = Admission(100, 4, lambda: now)
    assert admission.retry_after() == 1
    for step in range(200):
        now = step * 0.1
        admission.note(SimpleNamespace(num_waiting=40, num_running=4, num_admitted=step // 2))
    assert admission.retry_after() == 9, "40 wait, and 4.9 are admitted in a second"
    now += 100
    admission.note(SimpleNamespace(num_waiting=40, num_running=4, num_admitted=100))
    now += 10
    admission.note(SimpleNamespace(num_waiting=40, num_running=4, num_admitted=100))
    assert admission.retry_after() == 60, "none is admitted any more"
    admission.note(SimpleNamespace(num_waiting=0, num_running=4, num_admitted=140))
    assert admission.retry_after() == 1


def scenario_with_a_full_queue(check):
    """`check(client)` while one request runs in a step that does not end, and another was sent to the engine."""
    config = EngineConfig("fake-model", skip_tokenizer_init=False, max_num_seqs=1, max_queue=1)
    fake = FakeEngine(config=config, allow=threading.Semaphore(0))
    body = {"prompt": "a", "max_tokens": 1}

    async def scenario():
        async with started(fake) as engine, client_of(engine) as client:
            first = asyncio.create_task(client.post("/generate", json=body))
            await asyncio.to_thread(wait_until, lambda: fake.added, "the first request runs")
            second = asyncio.create_task(client.post("/generate", json=body))
            while engine.admission.num_waiting < 2:
                await asyncio.sleep(0.001)
            found = await check(client)
            fake.allow.release(10)
            assert [(await task).status_code for task in (first, second)] == [200, 200]
            metrics = (await client.get("/metrics")).text
            return found, metrics

    return run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "a"}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_a_full_queue_is_answered_429_with_retry_after(path, body, stream):
    async def check(client):
        return await client.post(path, json=body | {"stream": stream})

    response, metrics = scenario_with_a_full_queue(check)
    assert response.status_code == 429 and response.headers["retry-after"] == "60"
    error = response.json()["error"]
    assert error == {
        "message": "the server has 1 requests waiting and takes no more now; try again later",
        "type": "rate_limit_error",
        "param": None,
        "code": 429,
    }
    assert 'moe_runtime_requests_refused_total{model_name="fake-model"} 1.0' in metrics


def test_a_wrong_request_is_told_so_also_when_the_queue_is_full():
    async def check(client):
        return await client.post("/generate", json={"prompt": "a", "top_p": 7})

    response, _ = scenario_with_a_full_queue(check)
    assert response.status_code == 400


def late(finish_reason):
    """An engine whose requests end late after their first token."""
    fake = FakeEngine()
    advance = fake._advance

    def ends_late(request_id, request):
        delta = advance(request_id, request)
        if request.num_output_tokens < 2:
            return delta
        fake.running.pop(request_id, None)
        return replace(delta, token_ids=[], text="", finish_reason=finish_reason, error=f"{finish_reason}: late")

    fake._advance = ends_late
    return fake


@pytest.mark.parametrize(("reason", "status"), [("timeout", 504), ("queue_timeout", 429), ("error", 500)])
def test_a_request_that_ends_late(reason, status):
    async def scenario():
        async with started(late(reason)) as engine, client_of(engine) as client:
            body = {"prompt": "a", "max_tokens": 9, "timeout": 3.5}
            whole = await client.post("/generate", json=body)
            events = await client.post("/generate", json=body | {"stream": True})
            return whole, events, (await client.get("/metrics")).text

    whole, events, metrics = run(scenario())
    assert whole.status_code == status and whole.json()["error"]["message"] == f"{reason}: late"
    assert ("retry-after" in whole.headers) == (status == 429)
    *parts, last = events_of(events.text)
    assert parts and last["error"]["code"] == status
    assert f'finished_reason="{reason}",model_name="fake-model"}} 2.0' in metrics


def test_a_server_that_loads_says_when_to_come_back():
    gate = threading.Event()

    def make():
        assert gate.wait(20)
        return FakeEngine()

    async def scenario():
        engine = AsyncEngine(make)
        engine.start()
        async with client_of(engine) as client:
            found = [await client.get("/ready"), await client.post("/generate", json={"prompt": "a"})]
        gate.set()
        await engine.loaded
        assert await engine.close(DEADLINE)
        return found

    for response in run(scenario()):
        assert response.status_code == 503 and response.headers["retry-after"] == "5"
