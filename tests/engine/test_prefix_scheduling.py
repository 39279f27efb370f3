"""What the scheduler and the engine make of cached prefixes."""

from __future__ import annotations

from math import inf

import pytest
from fakes import generate_alone, make_engine

from moe_runtime.engine.engine import Engine
from moe_runtime.engine.prefix_cache import KeyMaker
from moe_runtime.engine.request import Request
from moe_runtime.engine.scheduler import Scheduler
from moe_runtime.engine.step_shapes import StepShapes
from moe_runtime.engine.step_time import StepTime
from moe_runtime.memory.page_group import PageGroup
from moe_runtime.types.outputs import OutputDelta
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.messages import PageCopy, StepPlan

SIZE = 8  # tokens per page
KEYS = KeyMaker(SIZE, False)


class Requests:
    """A scheduler and its requests; each sampled row gets the token 1 at once."""

    def __init__(self, *num_pages: int, windows: tuple[int | None, ...] = (None,), **limits: int) -> None:
        limits = {"max_num_seqs": 8, "max_num_batched_tokens": 100, **limits}
        groups = [PageGroup(window, SIZE, limits["max_num_batched_tokens"]) for window in windows]
        counts = [(count,) * len(windows) for count in num_pages]
        self.scheduler = Scheduler(counts, groups, shapes=StepShapes(), step_time=StepTime(inf), **limits)
        self.all: list[Request] = []

    def add(self, prompt: list[int], max_output_tokens: int = 30, salt: str | None = None, **params) -> Request:
        request = Request(
            request_id="",
            seq_id=len(self.all),
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            params=SamplingParams(**params),
            seed=0,
            max_output_tokens=max_output_tokens,
            page_keys=KEYS.keys(len(prompt), None, salt),
        )
        self.all.append(request)
        self.scheduler.add(request)
        return request

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        for chunk in (chunk for rank in plan.ranks for chunk in rank.chunks if chunk.sample):
            self.all[chunk.seq_id].append(1, [])
        return plan

    def step(self) -> list[list[tuple[int, int, int]]]:
        """(seq_id, start, num_tokens) of each rank."""
        ranks = self.plan().ranks
        return [[(chunk.seq_id, chunk.start, chunk.num_tokens) for chunk in rank.chunks] for rank in ranks]

    def finish(self, request: Request) -> None:
        self.scheduler.remove(request)

    @property
    def counts(self) -> tuple[int, int, int]:
        found = self.scheduler.prefix_counts()
        return found.queries, found.hits, found.evictions


def test_choices_compute_their_prompt_once_and_copy_the_page_in_which_it_ends():
    requests = Requests(40)
    for _ in range(3):
        requests.add(list(range(2, 32)))
    assert requests.step() == [[(0, 0, 30)]], "the others wait for its pages"
    plan = requests.plan().ranks[0]
    assert [(chunk.seq_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks] == [
        (0, 30, 1),
        (1, 29, 1),
        (2, 29, 1),
    ]
    own = [request.pages[0].pages for request in requests.all]
    assert own[0][:3] == own[1][:3] == own[2][:3] and len({pages[3] for pages in own}) == 3
    assert [new.pages for new in plan.new_sequences] == [[own[0][:3]], [own[0][:3]]]
    assert plan.page_copies == [PageCopy(0, own[0][3], own[1][3]), PageCopy(0, own[0][3], own[2][3])]
    assert [request.num_cached_tokens for request in requests.all] == [0, 29, 29]
    assert requests.scheduler.page_counts()[0].used == 3 + 3
    assert requests.counts == (90, 58, 0)


def test_a_prompt_that_ends_with_a_page_is_copied_too():
    requests = Requests(40)
    for _ in range(2):
        requests.add(list(range(16)))
    requests.step()
    plan = requests.plan().ranks[0]
    assert (plan.chunks[1].start, plan.chunks[1].num_tokens, len(plan.page_copies)) == (15, 1, 1)


def test_no_page_is_copied_if_the_last_token_begins_one():
    requests = Requests(40)
    for _ in range(2):
        requests.add(list(range(17)))
    requests.step()
    plan = requests.plan().ranks[0]
    assert (plan.chunks[1].start, plan.chunks[1].num_tokens, plan.page_copies) == (16, 1, [])


def test_those_that_wait_for_a_prompt_let_others_pass_and_go_on_when_it_ends():
    requests = Requests(60, max_num_batched_tokens=24, max_num_seqs=8)
    long = list(range(60))
    requests.add(long)
    requests.add([*long, 7, 8])
    requests.add([9] * 5)
    assert requests.step() == [[(0, 0, 24)]]
    assert requests.step() == [[(0, 24, 24)]]
    assert requests.step() == [[(0, 48, 12), (2, 0, 5)]], (
        "the second waits for what is computed here, the third does not"
    )
    assert requests.step() == [[(0, 60, 1), (2, 5, 1), (1, 56, 6)]]


def test_if_the_prompt_is_aborted_the_next_one_takes_what_was_planned():
    requests = Requests(60, max_num_batched_tokens=24, max_num_seqs=8)
    first = requests.add(list(range(60)))
    requests.add(list(range(60)))
    requests.add(list(range(60)))
    requests.step()
    requests.finish(first)
    assert requests.step() == [[(1, 24, 24)]], "the last one now waits for this one"
    assert requests.step() == [[(1, 48, 12)]]
    assert requests.step() == [[(1, 60, 1), (2, 59, 1)]]


def test_nobody_waits_for_less_than_most_of_what_is_missing():
    requests = Requests(60)
    requests.add(list(range(20)) + [50] * 5)
    requests.add(list(range(20)) + [51] * 30)
    requests.add(list(range(7)))
    requests.add(list(range(7)))
    assert requests.step() == [[(0, 0, 25), (1, 0, 50), (2, 0, 7), (3, 0, 7)]]


def test_a_preempted_sequence_and_the_next_turn_find_their_pages():
    requests = Requests(7)
    first, second = requests.add([2] * 15), requests.add([3] * 15)
    while requests.scheduler.num_preemptions == 0:
        requests.step()
    num_tokens = len(second.token_ids)
    assert second.rank is None and num_tokens > 24
    requests.finish(first)
    assert requests.step() == [[(1, 24, num_tokens - 24)]], "its full pages are still there"
    assert second.num_cached_tokens == 0, "that its prompt was computed once stays true"
    requests.finish(second)
    turn = requests.add([*second.token_ids, 5])
    assert requests.step() == [[(2, len(second.token_ids) // SIZE * SIZE, len(turn.token_ids) % SIZE - 1)]]


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 0}, {"return_routed_experts": True}])
def test_requests_that_need_every_position_compute_it_and_leave_their_pages(asked):
    requests = Requests(40)
    prompt = list(range(20))
    requests.add(prompt)
    requests.step()
    every = requests.add(prompt, **asked)
    assert requests.step() == [[(0, 20, 1), (1, 0, 20)]]
    assert every.num_cached_tokens == 0 and requests.counts[0] == 20, "it is not counted as a query"
    requests = Requests(40)
    requests.add(prompt, **asked)
    requests.step()
    requests.add(prompt)
    assert requests.step() == [[(0, 20, 1), (1, 19, 1)]]


def test_a_request_goes_where_its_prefix_is_unless_that_rank_has_more_to_do():
    requests = Requests(200, 200, max_num_batched_tokens=400)
    system = list(range(100))
    requests.add(system, max_output_tokens=40)
    requests.step()
    for ends in range(3):
        requests.add([*system, ends], max_output_tokens=40)
        requests.step()
    # The first rank has 40 tokens left to run for each of its sequences; the other one would compute 101 tokens.
    assert [request.rank for request in requests.all] == [0, 0, 0, 1]
    assert [request.num_cached_tokens for request in requests.all] == [0, 96, 100, 0]


def test_salts_keep_requests_apart():
    requests = Requests(40)
    for salt in (None, "a", "b", "a"):
        requests.add(list(range(20)), salt=salt)
        requests.step()
    assert [request.num_cached_tokens for request in requests.all] == [0, 0, 0, 19]


def test_cached_pages_are_free_and_forgotten_when_they_are_needed():
    requests = Requests(8)
    first = requests.add([2] * 40)
    requests.step()
    requests.finish(first)
    assert requests.scheduler.page_counts()[0].used == 0
    second = requests.add([3] * 48)
    assert requests.step() == [[(1, 0, 48)]]
    assert requests.counts == (88, 0, 3), "three pages had no content, and three were forgotten"
    requests.finish(second)
    requests.add([2] * 40)
    assert requests.step() == [[(2, 16, 24)]], "the last pages of a sequence are forgotten first"


def test_shared_pages_let_more_requests_in():
    prompt = list(range(41))
    with_cache, without = Requests(10), Requests(10)
    for requests in (with_cache, without):
        for request in (requests.add(prompt, max_output_tokens=5) for _ in range(3)):
            request.page_keys = request.page_keys if requests is with_cache else None
        requests.step()
        requests.step()
    assert with_cache.scheduler.num_running == 3
    assert without.scheduler.num_running == 1


def test_windows_need_only_the_pages_that_the_next_row_reads():
    requests = Requests(40, windows=(None, 9), max_num_batched_tokens=24)
    first = requests.add(list(range(60)))
    while first.num_planned < 60:
        requests.step()
    requests.finish(first)
    requests.add([*range(40), 99])
    plan = requests.plan().ranks[0]
    (new,) = plan.new_sequences
    assert plan.chunks[0].start == 40
    assert [len(pages) for pages in new.pages] == [5, 5] and new.pages[1][:4] == [0] * 4
    assert requests.all[1].pages[1].num_left == 4


def drain(engine: Engine) -> list[OutputDelta]:
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    return deltas


def test_the_engine_reports_cached_tokens_and_can_forget():
    prompt, params = list(range(1, 30)), SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    engine, executor = make_engine()
    expected, _ = generate_alone(prompt, params, 1, 64)
    found = []
    for index in range(3):
        if index == 2:
            engine.reset_prefix_cache()
        engine.add_request(str(index), prompt, params)
        deltas = drain(engine)
        assert [token for delta in deltas for token in delta.token_ids] == expected
        found.append({delta.num_cached_tokens for delta in deltas})
    assert found == [{0}, {28}, {0}]
    counts = engine.stats().prefix_cache
    assert (counts.queries, counts.hits, counts.evictions) == (87, 28, 0)
    assert engine.health()["prefix_caching"] == {"enabled": True, "reason": None}
    assert engine.stats().kv_cache_usage == 0
    assert sum(len(rank.page_copies) for plan in executor.plans for rank in plan.ranks) == 1


@pytest.mark.parametrize("options", [{"enable_prefix_caching": False}, {"capacity_factor": 1.5, "overflow": "drop"}])
def test_where_it_is_off_nothing_is_found(options):
    engine, _ = make_engine(**options)
    for index in range(2):
        engine.add_request(str(index), list(range(1, 30)), SamplingParams(max_tokens=1))
        assert {delta.num_cached_tokens for delta in drain(engine)} == {0}
    assert engine.stats().prefix_cache.queries == 0
    health = engine.health()["prefix_caching"]
    assert isinstance(health, dict) and health["enabled"] is False and health["reason"]
    engine.reset_prefix_cache()
