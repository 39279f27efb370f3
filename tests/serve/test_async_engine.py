import asyncio
import random
import re
import threading
import time

import pytest
from serve_clients import run, started
from serve_fakes import MAX_MODEL_LEN, RANK_ERROR, VOCAB, FakeEngine, wait_until

from moe_runtime.serve.async_engine import AsyncEngine, State
from moe_runtime.serve.engine_messages import AddRequest
from moe_runtime.serve.request_stream import UnavailableError
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.executor import RankError

LONG = SamplingParams(max_tokens=None)


async def tokens_of(engine, request_id, prompt, max_tokens):
    stream = await engine.submit([AddRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens))])
    deltas = [delta async for delta in stream]
    assert {delta.request_id for delta in deltas} == {request_id}
    # Of a reader who is late, several deltas become one.
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    return [token for delta in deltas for token in delta.token_ids]


async def until(condition):
    await asyncio.to_thread(wait_until, condition, "a condition of the test holds")


def test_each_request_gets_its_own_tokens_in_order(seed):
    rng = random.Random(seed)

    async def scenario():
        fake = FakeEngine()
        async with started(fake) as engine:
            jobs = [(f"r{start}", start, rng.randint(1, 40)) for start in rng.sample(range(800), 20)]
            results = await asyncio.gather(*(tokens_of(engine, name, [start], n) for name, start, n in jobs))
        assert results == [list(range(start + 1, start + 1 + n)) for _, start, n in jobs]
        assert fake.closed

    run(scenario())


def test_one_stream_carries_several_requests():
    async def scenario():
        async with started() as engine:
            requests = [AddRequest(f"r{i}", [i * 100], SamplingParams(max_tokens=3 + i)) for i in range(3)]
            stream = await engine.submit(requests)
            tokens = {request.request_id: [] for request in requests}
            async for delta in stream:
                tokens[delta.request_id] += delta.token_ids
        assert tokens == {f"r{i}": [i * 100 + 1 + n for n in range(3 + i)] for i in range(3)}

    run(scenario())


def test_one_refused_request_stops_its_siblings():
    async def scenario():
        fake = FakeEngine(refuses="bad")
        async with started(fake) as engine:
            with pytest.raises(ValueError, match="request_id: 'bad' is in use"):
                await engine.submit([AddRequest("good", [1], LONG), AddRequest("bad", [1], LONG)])
            await until(lambda: fake.aborted == ["good"])

    run(scenario())


@pytest.mark.parametrize("prompt", [[], [1] * MAX_MODEL_LEN, [5, VOCAB], [-1]])
def test_what_the_rules_refuse_does_not_wait_for_a_step(prompt):
    async def scenario():
        fake = FakeEngine(allow=threading.Semaphore(0))
        async with started(fake) as engine:
            stream = await engine.submit([AddRequest("running", [1], LONG)])  # the thread now waits inside a step
            with pytest.raises(ValueError, match=r"^prompt: "):
                await engine.submit([AddRequest("good", [1], LONG), AddRequest("bad", prompt, LONG)])
            assert [added[0] for added in fake.added] == ["running"]
            stream.close()
            fake.allow.release()

    run(scenario())


def test_closing_a_stream_frees_the_request_within_two_steps():
    async def scenario():
        fake = FakeEngine(allow=threading.Semaphore(0))
        async with started(fake) as engine:
            stream = await engine.submit([AddRequest("gone", [1], LONG)])  # the thread now waits inside a step
            second = asyncio.create_task(engine.submit([AddRequest("stays", [1], LONG)]))
            await asyncio.sleep(0)
            fake.allow.release(
                3
            )  # not before: three quick steps would leave the thread in a fourth, deaf to the second
            other = await second
            for _ in range(3):
                await anext(stream)
            stream.close()
            fake.allow.release(2)
            await until(lambda: fake.num_steps == 5)
            assert fake.aborted == ["gone"] and set(fake.running) == {"stays"}
            stream.close()  # does nothing the second time
            other.close()
            fake.allow.release(100)

    run(scenario())


def test_a_cancelled_submit_leaves_nothing_behind():
    async def scenario():
        fake = FakeEngine(allow=threading.Semaphore(0))
        async with started(fake) as engine:
            first = await engine.submit([AddRequest("first", [1], LONG)])  # the thread now waits inside a step
            second = asyncio.create_task(engine.submit([AddRequest("second", [1], LONG)]))
            await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            fake.allow.release(1)
            await until(lambda: fake.aborted == ["second"])
            first.close()
            fake.allow.release(100)

    run(scenario())


@pytest.mark.parametrize(
    ("error", "message", "logged"),
    [(RankError(RANK_ERROR), RANK_ERROR, False), (ZeroDivisionError("oh"), "ZeroDivisionError: oh", True)],
)
def test_a_failing_step_fails_all_requests(error, message, logged, caplog):
    async def scenario():
        fake = FakeEngine(die_at=10, die_with=error, step_seconds=0.02)
        async with started(fake) as engine:
            streams = [await engine.submit([AddRequest(f"r{i}", [1], LONG)]) for i in range(2)]
            for stream in streams:
                with pytest.raises(UnavailableError, match=re.escape(message)):
                    _ = [delta async for delta in stream]
            assert await engine.died == message
            assert engine.state is State.DEAD
            with pytest.raises(UnavailableError, match=re.escape(message)):
                await engine.submit([AddRequest("late", [1], LONG)])
            with pytest.raises(UnavailableError, match=re.escape(message)):
                await engine.query("placement")
            await until(lambda: fake.closed)

    run(scenario())
    assert ("Traceback" in caplog.text) == logged


def test_a_rank_that_dies_while_idle_is_noticed():
    async def scenario():
        fake = FakeEngine()
        async with started(fake) as engine:
            fake.rank_is_dead = True
            started_at = time.monotonic()
            assert await engine.died == RANK_ERROR
            assert time.monotonic() - started_at < 5
            assert fake.threads == {"engine"}

    run(scenario())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("model: 'x' is no checkpoint"), ValueError),
        (RankError(RANK_ERROR), UnavailableError),
        (KeyError("lost"), UnavailableError),
    ],
)
def test_an_engine_that_cannot_be_made(error, kind):
    def make_engine():
        raise error

    async def scenario():
        engine = AsyncEngine(make_engine)
        assert engine.state is State.LOADING
        engine.start()
        with pytest.raises(kind) as caught:
            await engine.loaded
        assert str(error) in str(caught.value)
        with pytest.raises(UnavailableError, match="could not be loaded"):
            engine.require_ready()
        assert await engine.close(5)

    run(scenario())


def test_nothing_is_taken_while_loading():
    async def scenario():
        may_load = threading.Event()

        def make_engine():
            assert may_load.wait(10)
            return FakeEngine()

        engine = AsyncEngine(make_engine)
        engine.start()
        with pytest.raises(UnavailableError, match="loading"):
            await engine.submit([AddRequest("early", [1], LONG)])
        with pytest.raises(UnavailableError, match="loading"):
            await engine.query("expert_load")
        may_load.set()
        info = await engine.loaded
        assert info is engine.require_ready() and info.model_name == "fake-model"
        assert await engine.close(5)

    run(scenario())


def test_drain_lets_requests_finish_and_takes_no_more():
    async def scenario():
        fake = FakeEngine(allow=threading.Semaphore(0))
        async with started(fake) as engine:
            stream = await engine.submit([AddRequest("last", [1], SamplingParams(max_tokens=5))])
            draining = asyncio.create_task(engine.drain(10))
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="shutting down"):
                await engine.submit([AddRequest("late", [1], LONG)])
            fake.allow.release(5)
            assert [delta.token_ids async for delta in stream] == [[2], [3], [4], [5], [6]]
            assert await draining == 0

    run(scenario())


def test_drain_aborts_what_takes_too_long():
    async def scenario():
        fake = FakeEngine(step_seconds=0.01)
        async with started(fake) as engine:
            stream = await engine.submit([AddRequest("long", [1], LONG)])
            assert await engine.drain(0.05) == 1
            with pytest.raises(UnavailableError, match="shutting down"):
                _ = [delta async for delta in stream]
            await until(lambda: fake.aborted == ["long"])

    run(scenario())


def test_close_fails_what_waits():
    async def scenario():
        fake = FakeEngine(allow=threading.Semaphore(0))
        async with started(fake) as engine:
            stream = await engine.submit([AddRequest("running", [1], LONG)])
            query = asyncio.create_task(engine.query("placement"))
            await asyncio.sleep(0)
            closing = asyncio.create_task(engine.close(10))
            with pytest.raises(UnavailableError, match="shutting down"):
                await query
            with pytest.raises(UnavailableError, match="shutting down"):
                await anext(stream)
            fake.allow.release(10)
            assert await closing and fake.closed

    run(scenario())
