from __future__ import annotations

import subprocess
import sys
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.engine.request import Request
from moe_runtime.engine.scheduler import Scheduler
from moe_runtime.engine.step_shapes import StepShapes
from moe_runtime.engine.step_time import StepTime
from moe_runtime.memory.graph_buckets import ALL_GATHER_MAX_TOKENS
from moe_runtime.memory.page_group import PageGroup
from moe_runtime.types.sampling_params import SamplingParams


def make_request(
    seq_id: int, num_tokens: int, max_output_tokens: int = 1000, priority: int = 0, user: str = ""
) -> Request:
    return Request(
        request_id=str(seq_id),
        seq_id=seq_id,
        token_ids=list(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        params=SamplingParams(priority=priority),
        seed=0,
        max_output_tokens=max_output_tokens,
        user=user,
    )


def make_scheduler(
    num_pages: list[int] | list[tuple[int, ...]],
    lengths: list[int],
    windows: tuple[int | None, ...] = (None,),
    **limits,
) -> tuple[Scheduler, list[Request]]:
    shapes = StepShapes(**{name: limits.pop(name) for name in ("dispatcher", "buckets") if name in limits})
    step_time = limits.pop("step_time", None) or StepTime(inf)
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 100, **limits}
    groups = [PageGroup(window, 8, limits["max_num_batched_tokens"]) for window in windows]
    counts = [(count,) if isinstance(count, int) else count for count in num_pages]
    scheduler = Scheduler(counts, groups, shapes=shapes, step_time=step_time, **limits)
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


def usage(scheduler: Scheduler) -> float:
    return max(counts.usage for counts in scheduler.page_counts())


def test_no_work_no_step():
    scheduler, _ = make_scheduler([4], [])
    assert scheduler.schedule() is None
    assert (scheduler.num_steps, scheduler.num_running, usage(scheduler)) == (0, 0, 0)


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
        pages.append([len(chunk.new_pages[0]) for chunk in scheduler.schedule().ranks[0].chunks])
        if requests[0].num_pending:
            requests[0].append(1, [])
    assert pages == [[2], [1], [0], [0], [0], [0], [0], [1]]
    assert usage(scheduler) == 4 / 64


def test_pages_behind_the_window_are_given_back():
    scheduler, requests = make_scheduler([(64, 64)], [60], (None, 9), max_num_batched_tokens=16, max_num_seqs=8)
    held = []
    while requests[0].num_planned < 75:
        step(scheduler, requests)
        held.append([counts.used for counts in scheduler.page_counts()])
    assert held[:4] == [[2, 2], [4, 3], [6, 3], [8, 3]], "a chunk of two pages, and the eight tokens before it"
    assert held[-1] == [10, 2]
    scheduler.remove(requests[0])
    assert [counts.used for counts in scheduler.page_counts()] == [0, 0]


def test_a_group_that_is_full_preempts_though_another_has_room():
    scheduler, requests = make_scheduler([(64, 5)], [10, 10], (None, 17), max_num_batched_tokens=40, max_num_seqs=8)
    while not scheduler.num_preemptions:
        step(scheduler, requests)
        assert len(requests[0].token_ids) < 60
    assert requests[1].rank is None and scheduler.page_counts()[0].used < 10


@given(
    window=st.integers(1, 30),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(6, 50),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12),
)
def test_pages_for_all_sequences_are_enough(window, max_num_seqs, budget, lengths):
    """With the pages that the memory plan gives at most, windows never stop a sequence."""
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget}
    most = [PageGroup(each, 8, budget).most_of_step(max_num_seqs, 90) for each in (None, window)]
    scheduler, requests = make_scheduler([tuple(most)], lengths, (None, window), **limits)
    for request in requests:
        request.max_output_tokens = 20
    left = set(requests)
    while left:
        assert step(scheduler, requests) is not None
        for request in [request for request in left if request.num_output_tokens == 20]:
            scheduler.remove(request)
            left.remove(request)
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize("windows", [(None,), (5,), (None, 5)])
def test_sequences_that_need_no_other_page_are_admitted_together(windows):
    scheduler, requests = make_scheduler([(8,) * len(windows)], [3] * 8, windows)
    for request in requests:
        request.max_output_tokens = 5
    assert len(step(scheduler, requests)[0]) == 8, "each needs one page, also in the end"


def test_a_request_goes_to_the_rank_with_the_fewest_tokens_to_compute_then_the_most_pages_then_the_first():
    scheduler, requests = make_scheduler([20, 20, 30], [10, 3, 4, 5, 2])
    step(scheduler, requests)
    assert [request.rank for request in requests] == [2, 0, 1, 0, 1]


def test_what_a_rank_has_still_to_compute_counts_not_only_this_step():
    scheduler, requests = make_scheduler([40, 40], [90, 10], max_num_batched_tokens=30)
    for _ in range(2):
        assert step(scheduler, requests)[0][0][2] == 30
    requests[1].max_output_tokens = 1
    scheduler.remove(requests[1])
    requests.append(make_request(2, 40, max_output_tokens=5))
    scheduler.add(requests[2])
    requests[0].max_output_tokens = 5
    requests.append(make_request(3, 4, max_output_tokens=5))
    scheduler.add(requests[3])
    assert step(scheduler, requests) == [[(0, 60, 30)], [(2, 0, 30)]]
    assert step(scheduler, requests) == [[(0, 90, 1), (3, 0, 4)], [(2, 30, 10)]], "the first has less left to compute"


def test_a_long_output_counts_as_one_of_256_tokens():
    scheduler, requests = make_scheduler([400, 400], [])
    for seq_id, (length, max_output_tokens) in enumerate([(5, 10_000), (6, 200), (70, 1), (3, 1)]):
        requests.append(make_request(seq_id, length, max_output_tokens))
        scheduler.add(requests[-1])
    step(scheduler, requests)
    assert [request.rank for request in requests] == [0, 1, 1, 0], "206 + 71 tokens are more than 261"


def test_running_requests_of_a_lower_priority_are_preempted_first():
    scheduler, requests = make_scheduler([6], [])
    for seq_id, priority in enumerate([1, 0]):
        requests.append(make_request(seq_id, 15, priority=priority))
        scheduler.add(requests[-1])
    assert step(scheduler, requests) == [[(1, 0, 15), (0, 0, 15)]], "lower numbers come first in a step too"
    while not scheduler.num_preemptions:
        step(scheduler, requests)
    assert (list(scheduler.waiting), scheduler.ranks[0].running) == ([requests[0]], [requests[1]])


def test_lower_priorities_are_admitted_first_and_running_ones_go_on():
    scheduler, requests = make_scheduler([64], [5, 5], max_num_seqs=2)
    step(scheduler, requests)
    for seq_id, priority in ((2, 0), (3, -1), (4, 5), (5, -1)):
        requests.append(make_request(seq_id, 5, priority=priority))
        scheduler.add(requests[-1])
    order = []
    for gone in (0, 1, 3, 5, 2):
        scheduler.remove(requests[gone])
        order += [seq_id for seq_id, start, _ in step(scheduler, requests)[0] if start == 0]
    assert order == [3, 5, 2, 4]


def test_users_take_turns_when_requests_wait():
    scheduler, requests = make_scheduler([64], [], max_num_seqs=1, max_num_batched_tokens=10)
    for seq_id, user in enumerate("aaaabb"):
        requests.append(make_request(seq_id, 5, user=user))
        scheduler.add(requests[-1])
    order = []
    while any(request.rank is None for request in requests if request not in order):
        step(scheduler, requests)
        (running,) = scheduler.ranks[0].running
        order.append(running)
        scheduler.remove(running)
    assert [request.user for request in order] == ["a", "b", "a", "b", "a", "a"]


def test_the_first_that_waits_for_pages_lets_later_ones_wait():
    scheduler, requests = make_scheduler([8], [30, 60, 5])
    assert step(scheduler, requests) == [[(0, 0, 30)]]
    assert list(scheduler.waiting) == requests[1:]
    scheduler.remove(requests[0])
    assert step(scheduler, requests) == [[(1, 0, 60)]]
    scheduler.remove(requests[1])
    assert step(scheduler, requests) == [[(2, 0, 5)]]


def test_a_page_is_kept_for_each_that_runs():
    scheduler, requests = make_scheduler([8], [20, 10, 14, 5])
    assert step(scheduler, requests) == [[(0, 0, 20), (1, 0, 10)]], "of eight pages five are taken and two are kept"
    assert step(scheduler, requests) == [[(0, 20, 1), (1, 10, 1)]]
    assert list(scheduler.waiting) == requests[2:]
    scheduler.remove(requests[1])
    assert step(scheduler, requests) == [[(0, 21, 1), (2, 0, 14), (3, 0, 5)]]


def test_prompts_under_way_keep_others_out():
    scheduler, requests = make_scheduler([10], [60, 20], max_num_batched_tokens=16, max_num_seqs=2)
    for start in (0, 16, 32):
        assert step(scheduler, requests) == [[(0, start, 16)]]
    assert scheduler.ranks[0].pages.pools[0].num_free == 4, "room for the second prompt, but for the first one's end"
    assert step(scheduler, requests) == [[(0, 48, 12)]]
    assert list(scheduler.waiting) == [requests[1]]


def test_max_num_seqs_is_per_rank():
    scheduler, requests = make_scheduler([20, 20], [2] * 7, max_num_seqs=3)
    step(scheduler, requests)
    assert [len(rank.running) for rank in scheduler.ranks] == [3, 3]
    assert list(scheduler.waiting) == [requests[6]]


def test_the_latest_is_preempted_and_comes_back_with_its_tokens():
    scheduler, requests = make_scheduler([6], [15, 15])
    assert step(scheduler, requests) == [[(0, 0, 15), (1, 0, 15)]]
    for position in range(15, 24):
        assert step(scheduler, requests) == [[(0, position, 1), (1, position, 1)]]
    for position in range(24, 32):
        assert step(scheduler, requests) == [[(0, position, 1)]]
    assert (scheduler.num_preemptions, list(scheduler.waiting)) == (1, [requests[1]])
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
    scheduler = Scheduler(
        [(8,)],
        [PageGroup(None, 8, 16)],
        max_num_seqs=4,
        max_num_batched_tokens=16,
        shapes=StepShapes(),
        step_time=StepTime(inf),
    )
    scheduler.add(make_request(0, 5, max_output_tokens=2))
    assert scheduler.schedule().ranks[0].num_decode == 0
    assert scheduler.schedule().ranks[0].num_decode == 1
    assert scheduler.schedule() is None, "both tokens are on their way"


def test_removing_says_dropped_with_the_next_plan_only():
    scheduler, requests = make_scheduler([8, 8], [5, 5, 5])
    scheduler.remove(requests[2])
    step(scheduler, requests)
    scheduler.remove(requests[0])
    assert usage(scheduler) == 1 / 16
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
