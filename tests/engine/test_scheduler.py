from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass

import pytest
from fakes import EOS, VOCAB_SIZE, fake_logprobs, generate_alone, make_engine
from hypothesis import event, given, settings
from hypothesis import strategies as st

from moe_runtime.engine.engine import Engine
from moe_runtime.engine.request import Request
from moe_runtime.engine.scheduler import Scheduler
from moe_runtime.engine.step_shapes import StepShapes
from moe_runtime.memory.graph_buckets import ALL_GATHER_MAX_TOKENS
from moe_runtime.types.outputs import OutputDelta
from moe_runtime.types.sampling_params import SamplingParams


def make_request(seq_id: int, num_tokens: int, max_output_tokens: int = 1000) -> Request:
    return Request(
        request_id=str(seq_id),
        seq_id=seq_id,
        prompt=None,
        token_ids=list(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        params=SamplingParams(),
        seed=0,
        max_output_tokens=max_output_tokens,
    )


def make_scheduler(num_pages: list[int], lengths: list[int], **limits) -> tuple[Scheduler, list[Request]]:
    shapes = StepShapes(**{name: limits.pop(name) for name in ("dispatcher", "buckets") if name in limits})
    scheduler = Scheduler(num_pages, 8, shapes=shapes, **{"max_num_seqs": 8, "max_num_batched_tokens": 100, **limits})
    requests = [make_request(seq_id, length) for seq_id, length in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    return scheduler, requests


def step(scheduler: Scheduler, requests: list[Request]) -> list[list[tuple[int, int, int]]] | None:
    """Schedule and give every sampled row its token. Returns (seq_id, start, num_tokens) per rank."""
    plan = scheduler.schedule()
    if plan is None:
        return None
    for chunk in (chunk for rank in plan.ranks for chunk in rank.chunks if chunk.sample):
        requests[chunk.seq_id].append(1, [])
    return [[(chunk.seq_id, chunk.start, chunk.num_tokens) for chunk in rank.chunks] for rank in plan.ranks]


def test_no_work_no_step():
    scheduler, _ = make_scheduler([4], [])
    assert scheduler.schedule() is None
    assert (scheduler.num_steps, scheduler.num_running, scheduler.usage) == (0, 0, 0)


def test_long_prompts_run_in_chunks_and_decode_rows_come_first():
    scheduler, requests = make_scheduler([64], [10, 70, 30], max_num_batched_tokens=40, max_num_seqs=40)
    assert step(scheduler, requests) == [[(0, 0, 10), (1, 0, 30)]]
    assert step(scheduler, requests) == [[(0, 10, 1), (1, 30, 39)]]
    assert step(scheduler, requests) == [[(0, 11, 1), (1, 69, 1), (2, 0, 30)]]
    assert step(scheduler, requests) == [[(0, 12, 1), (1, 70, 1), (2, 30, 1)]]
    assert [len(request.token_ids) for request in requests] == [10 + 4, 70 + 2, 30 + 2]


def test_pages_for_exactly_the_chunk():
    scheduler, requests = make_scheduler([64], [20], max_num_batched_tokens=9, max_num_seqs=9)
    pages = []
    for _ in range(8):
        pages.append([len(chunk.new_pages) for chunk in scheduler.schedule().ranks[0].chunks])
        if requests[0].num_pending:
            requests[0].append(1, [])
    assert pages == [[2], [1], [0], [0], [0], [0], [0], [1]]
    assert scheduler.usage == 4 / 64


def test_a_request_goes_to_the_rank_with_the_fewest_tokens_then_the_most_pages_then_the_first():
    scheduler, requests = make_scheduler([20, 20, 30], [10, 3, 4, 5, 2])
    step(scheduler, requests)
    assert [request.rank for request in requests] == [2, 0, 1, 0, 1]


def test_the_first_that_waits_for_pages_lets_later_ones_wait():
    scheduler, requests = make_scheduler([8], [30, 60, 5])
    assert step(scheduler, requests) == [[(0, 0, 30)]]
    assert scheduler.waiting == requests[1:]
    scheduler.remove(requests[0])
    assert step(scheduler, requests) == [[(1, 0, 60)]]
    scheduler.remove(requests[1])
    assert step(scheduler, requests) == [[(2, 0, 5)]]


def test_a_page_is_kept_for_each_that_runs():
    scheduler, requests = make_scheduler([8], [20, 10, 14, 5])
    assert step(scheduler, requests) == [[(0, 0, 20), (1, 0, 10)]], "of eight pages five are taken and two are kept"
    assert step(scheduler, requests) == [[(0, 20, 1), (1, 10, 1)]]
    assert scheduler.waiting == requests[2:]
    scheduler.remove(requests[1])
    assert step(scheduler, requests) == [[(0, 21, 1), (2, 0, 14), (3, 0, 5)]]


def test_prompts_under_way_keep_others_out():
    scheduler, requests = make_scheduler([10], [60, 20], max_num_batched_tokens=16, max_num_seqs=2)
    for start in (0, 16, 32):
        assert step(scheduler, requests) == [[(0, start, 16)]]
    assert scheduler.ranks[0].pool.num_free == 4, "room for the second prompt, but for the first one's end"
    assert step(scheduler, requests) == [[(0, 48, 12)]]
    assert scheduler.waiting == [requests[1]]


def test_max_num_seqs_is_per_rank():
    scheduler, requests = make_scheduler([20, 20], [2] * 7, max_num_seqs=3)
    step(scheduler, requests)
    assert [len(rank.running) for rank in scheduler.ranks] == [3, 3]
    assert scheduler.waiting == [requests[6]]


def test_the_latest_is_preempted_and_comes_back_with_its_tokens():
    scheduler, requests = make_scheduler([6], [15, 15])
    assert step(scheduler, requests) == [[(0, 0, 15), (1, 0, 15)]]
    for position in range(15, 24):
        assert step(scheduler, requests) == [[(0, position, 1), (1, position, 1)]]
    for position in range(24, 32):
        assert step(scheduler, requests) == [[(0, position, 1)]]
    assert (scheduler.num_preemptions, scheduler.waiting) == (1, [requests[1]])
    scheduler.remove(requests[0])
    plan = scheduler.schedule()
    (new,) = plan.ranks[0].new_sequences
    assert (new.seq_id, new.token_ids, new.num_prompt_tokens) == (1, requests[1].token_ids, 15)
    assert len(new.token_ids) == 15 + 10
    assert (plan.ranks[0].num_decode, plan.ranks[0].chunks[0].num_tokens) == (0, 25)
    assert plan.ranks[0].dropped == [0], "that the other was dropped has been said before"


def test_a_preempted_sequence_moves_to_a_rank_with_room_in_the_same_step():
    scheduler, requests = make_scheduler([5, 9], [32, 15, 15])
    step(scheduler, requests)
    assert [request.rank for request in requests] == [1, 0, 0]
    scheduler.remove(requests[0])
    requests.append(make_request(3, num_tokens=5))
    scheduler.add(requests[3])
    assert step(scheduler, requests) == [[(1, 15, 1), (2, 15, 1)], [(3, 0, 5)]]
    plan = scheduler.schedule()
    assert plan.ranks[0].dropped == [2]
    assert [(new.seq_id, len(new.token_ids)) for new in plan.ranks[1].new_sequences] == [(2, 17)]
    assert scheduler.ranks[1].running == [requests[2], requests[3]], "in order of arrival there too"


def test_a_preempted_sequence_waits_for_its_token_in_flight():
    scheduler, requests = make_scheduler([6, 4], [23, 30, 15])
    step(scheduler, requests)
    scheduler.remove(requests[1])
    in_flight = scheduler.schedule()
    assert [chunk.seq_id for chunk in in_flight.ranks[0].chunks] == [0, 2]
    plan = scheduler.schedule()
    assert (plan.ranks[0].dropped, requests[2].num_pending) == ([2], 1)
    assert plan.ranks[1].new_sequences == [], "there is room, but not all of its tokens are known"
    requests[2].append(1, [])
    (new,) = scheduler.schedule().ranks[1].new_sequences
    assert new.token_ids == requests[2].token_ids


def test_everyone_stays_in_order_of_arrival():
    scheduler, requests = make_scheduler([6, 6], [15, 16, 15, 15, 40])
    step(scheduler, requests)
    for _ in range(30):
        step(scheduler, requests)
        for requests_there in (scheduler.waiting, *(rank.running for rank in scheduler.ranks)):
            order = [request.seq_id for request in requests_there]
            assert order == sorted(order)
    assert scheduler.num_preemptions > 1


def test_no_row_beyond_the_length():
    scheduler = Scheduler([8], 8, max_num_seqs=4, max_num_batched_tokens=16, shapes=StepShapes())
    scheduler.add(make_request(0, 5, max_output_tokens=2))
    assert scheduler.schedule().ranks[0].num_decode == 0
    assert scheduler.schedule().ranks[0].num_decode == 1
    assert scheduler.schedule() is None, "both tokens are on their way"


def test_removing_says_dropped_with_the_next_plan_only():
    scheduler, requests = make_scheduler([8, 8], [5, 5, 5])
    scheduler.remove(requests[2])
    step(scheduler, requests)
    scheduler.remove(requests[0])
    assert scheduler.usage == 1 / 16
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [rank.dropped for rank in first.ranks] == [[0], []]
    assert [rank.dropped for rank in second.ranks] == [[], []]


@pytest.mark.parametrize(
    ("num_ranks", "length", "dispatcher", "expected"),
    [
        (1, 5, "auto", "local"),
        (2, ALL_GATHER_MAX_TOKENS, "auto", "all_gather"),
        (2, ALL_GATHER_MAX_TOKENS + 1, "auto", "all_to_all"),
        (2, 5, "all_to_all", "all_to_all"),
        (2, 90, "all_gather", "all_gather"),
    ],
)
def test_the_plan_chooses_the_dispatcher(num_ranks, length, dispatcher, expected):
    scheduler, _ = make_scheduler([20] * num_ranks, [length], dispatcher=dispatcher)
    plan = scheduler.schedule()
    assert plan.dispatcher == expected
    assert plan.tokens_per_rank == [length] + [0] * (num_ranks - 1)


def planned(scheduler: Scheduler, requests: list[Request]) -> tuple[str, int, list[int]]:
    """Dispatcher, bucket and tokens per rank of the next step."""
    plan = scheduler.schedule()
    for chunk in (chunk for rank in plan.ranks for chunk in rank.chunks if chunk.sample):
        requests[chunk.seq_id].append(1, [])
    return plan.dispatcher, plan.bucket, plan.tokens_per_rank


def test_steps_of_decode_rows_alone_take_the_least_bucket_that_holds_every_rank():
    scheduler, requests = make_scheduler([64, 64], [5, 5, 5, 5, 5], buckets=(1, 2, 4))
    assert planned(scheduler, requests) == ("all_gather", 0, [15, 10])
    assert planned(scheduler, requests) == ("padded", 4, [3, 2])
    scheduler.remove(requests[0])
    assert planned(scheduler, requests) == ("padded", 2, [2, 2])
    for request in requests[2:4]:
        scheduler.remove(request)
    assert planned(scheduler, requests) == ("padded", 1, [1, 1])
    requests.append(make_request(5, 6))
    scheduler.add(requests[5])
    assert planned(scheduler, requests)[:2] == ("all_gather", 0)
    assert planned(scheduler, requests)[:2] == ("padded", 2)


def test_more_rows_than_the_largest_bucket_take_an_ordinary_step():
    scheduler, requests = make_scheduler([64], [3, 3, 3], buckets=(1, 2))
    assert planned(scheduler, requests) == ("local", 0, [9])
    assert planned(scheduler, requests) == ("local", 0, [3])
    scheduler.remove(requests[1])
    assert planned(scheduler, requests) == ("padded", 2, [2])


@pytest.mark.parametrize("asked", [{"return_routed_experts": True}, {"routing": "top_k=2"}])
def test_a_request_that_asks_more_of_the_gates_takes_all_into_ordinary_steps(asked):
    scheduler, requests = make_scheduler([64], [3, 3], buckets=(1, 2))
    requests[1].params = SamplingParams(**asked)
    assert planned(scheduler, requests) == ("local", 0, [6])
    assert planned(scheduler, requests) == ("local", 0, [2])
    scheduler.remove(requests[1])
    assert planned(scheduler, requests) == ("padded", 1, [1])


def test_imports_no_torch():
    code = (
        "import sys; import moe_runtime.engine.scheduler, moe_runtime.types.sampling_params; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    params: SamplingParams
    abort_after: int | None  # steps


@st.composite
def arrivals(draw: st.DrawFn, max_model_len: int) -> Arrival:
    length = draw(st.integers(1, max(1, max_model_len // 2)) | st.integers(1, max_model_len - 1))
    rng = random.Random(draw(st.integers(0, 10**6)))
    params = SamplingParams(
        max_tokens=draw(st.none() | st.just(25) | st.integers(1, 30)),
        seed=draw(st.integers(0, 3)),
        ignore_eos=draw(st.sampled_from([True, True, False])),
        stop_token_ids=draw(st.sampled_from([(), (), (), (1, 2, 3)])),
        logprobs=draw(st.none() | st.integers(0, 2)),
        prompt_logprobs=draw(st.none() | st.integers(0, 2)),
    )
    return Arrival(
        step=draw(st.just(0) | st.integers(0, 30)),
        prompt=[rng.randrange(1, VOCAB_SIZE) for _ in range(length)],
        params=params,
        abort_after=draw(st.sampled_from([None, None, None, 0, 1, 2, 7])),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[dict, list[Arrival]]:
    max_model_len = draw(st.integers(2, 40) | st.integers(25, 40))
    least = -(-max_model_len // 8)
    max_num_seqs = draw(st.integers(1, 5) | st.just(5))
    options = {
        "max_model_len": max_model_len,
        "num_pages": draw(st.lists(st.integers(least, least + 3), min_size=1, max_size=3)),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(max_num_seqs, 24)),
        "max_inflight": draw(st.integers(1, 2)),
    }
    return options, draw(st.lists(arrivals(max_model_len), min_size=4, max_size=12))


def run(engine: Engine, arriving: list[Arrival]) -> dict[str, list[OutputDelta]]:
    deltas: dict[str, list[OutputDelta]] = {str(index): [] for index in range(len(arriving))}
    for now in range(5000):
        for index, arrival in enumerate(arriving):
            if arrival.step == now:
                engine.add_request(str(index), arrival.prompt, arrival.params)
            if arrival.abort_after is not None and arrival.step + arrival.abort_after == now:
                engine.abort(str(index))
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
        if now > 60 and not engine.has_work:
            return deltas
    raise AssertionError("requests starve")


def expected_logprobs(context: list[int], token_ids: list[int], num_best: int) -> list[dict[int, tuple[float, int]]]:
    positions = []
    for token_id in token_ids:
        found = fake_logprobs(context, token_id, num_best)
        positions.append(dict(zip(found.token_ids, zip(found.logprobs, found.ranks, strict=True), strict=True)))
        context = [*context, token_id]
    return positions


def plain(positions: list) -> list[dict[int, tuple[float, int]]]:
    return [{token: (entry.logprob, entry.rank) for token, entry in position.items()} for position in positions]


@settings(deadline=None, max_examples=200)
@given(scenarios())
def test_whatever_happens_the_tokens_are_those_of_a_request_alone(scenario):
    options, arriving = scenario
    engine, executor = make_engine(**options)
    deltas = run(engine, arriving)
    for index, arrival in enumerate(arriving):
        params, parts = arrival.params, deltas[str(index)]
        assert [part.finish_reason is not None for part in parts] == [False] * (len(parts) - 1) + [True]
        token_ids, finish_reason = generate_alone(arrival.prompt, params, params.seed, options["max_model_len"])
        got = [token for part in parts for token in part.token_ids]
        if parts[-1].finish_reason == "abort":
            assert arrival.abort_after is not None
            token_ids = token_ids[: len(got)]
        else:
            assert parts[-1].finish_reason == finish_reason
            stopped_by = token_ids[-1] if finish_reason == "stop" and token_ids[-1] != EOS else None
            assert parts[-1].stop_reason == stopped_by
        assert got == token_ids
        assert parts[-1].num_output_tokens == len(got) and parts[-1].num_prompt_tokens == len(arrival.prompt)
        assert [part.prompt_token_ids for part in parts] == [arrival.prompt] + [None] * (len(parts) - 1)
        if params.logprobs is not None:
            logprobs = [entry for part in parts for entry in part.logprobs]
            assert plain(logprobs) == expected_logprobs(arrival.prompt, got, params.logprobs)
        if params.prompt_logprobs is not None and got:
            nothing, *found = parts[0].prompt_logprobs
            assert nothing is None
            assert plain(found) == expected_logprobs(arrival.prompt[:1], arrival.prompt[1:], params.prompt_logprobs)
    stats = engine.stats()
    event("preempted" if stats.num_preemptions else "not preempted")
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0), "pages have leaked"
    assert sum(stats.finished.values()) == len(arriving)
    # First come, first served: no request starts before one that arrived earlier (and was not aborted while waiting).
    started: list[int] = []
    for plan in executor.plans:
        new = {sequence.seq_id for rank in plan.ranks for sequence in rank.new_sequences} - set(started)
        started += sorted(new)
    assert started == sorted(started)
