"""Pages, index and prefix cache of a rank under any order of events, beside a slow model of what is in the pages."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.page_pool import Hit, RankPages
from moe_runtime.engine.prefix_cache import KeyMaker, PrefixCache, why_off
from moe_runtime.engine.request import Request
from moe_runtime.memory.page_group import PageGroup
from moe_runtime.types.expert_policy import ExpertPolicy
from moe_runtime.types.sampling_params import SamplingParams

BLOCK, CHUNK = 4, 12
Content = tuple[object, ...]  # what a key and its value depend on: the request's own part, then all tokens up to there


class Running:
    """A sequence: its request, what else its keys depend on, and the tokens that its rank will have sampled."""

    def __init__(self, request: Request, origin: object, answer: list[int]) -> None:
        self.request, self.origin, self.answer = request, origin, answer

    def content(self, position: int) -> Content:
        request = self.request
        tokens = request.token_ids[: request.num_prompt_tokens] + self.answer
        return (self.origin, *tokens[: position + 1])


class PrefixCaches(RuleBasedStateMachine):
    """In the slow model, a page is a list with the content of each of its positions, and the index is the pages that it
    has been told of, as long as they are not handed out again."""

    @initialize(windows=st.sampled_from([(None,), (None, 7), (5,), (9, None, 3)]), spare=st.integers(0, 9))
    def begin(self, windows, spare):
        self.groups = [PageGroup(window, BLOCK, CHUNK) for window in windows]
        self.pages = RankPages(self.groups, [group.most(40) + spare for group in self.groups])
        self.cache = PrefixCache(self.pages)
        self.maker = KeyMaker(BLOCK, False)
        self.cells: list[dict[int, list[Content | None]]] = [{} for _ in windows]
        self.known: list[dict[Content, int]] = [{} for _ in windows]  # content of a page's last position -> page
        self.num_resets = 0
        self.running: list[Running] = []
        self.waiting: list[Running] = []
        self.ids = itertools.count()

    @rule(
        text=st.integers(0, 2),
        num_shared=st.integers(0, 24),
        own=st.lists(st.integers(0, 1), max_size=4),
        policy=st.sampled_from([None, None, ExpertPolicy(top_k=1)]),
        salt=st.sampled_from([None, None, "s"]),
        every=st.sampled_from([False, False, False, True]),
        chunk=st.integers(1, CHUNK),
    )
    def add(self, text, num_shared, own, policy, salt, every, chunk):
        prompt = [text] * num_shared + own or [text]
        request = Request(
            request_id="",
            seq_id=next(self.ids),
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            params=SamplingParams(prompt_logprobs=0 if every else None),
            seed=0,
            max_output_tokens=40 - len(prompt),
            page_keys=self.maker.keys(len(prompt), policy, salt),
        )
        self.waiting.append(Running(request, (policy, salt, self.num_resets), [sum(prompt) % 2] * 40))
        self.admit(-1, chunk)

    @rule(which=st.integers(0, 9), chunk=st.integers(1, CHUNK))
    def admit(self, which, chunk):
        if not self.waiting or self.waiting[which % len(self.waiting)].request.num_pending:
            return
        sequence = self.waiting[which % len(self.waiting)]
        request, hit = sequence.request, self.cache.find(sequence.request)
        assert hit.num_tokens < len(request.token_ids), "the last token is computed"
        assert hit.num_tokens == self.slow_find(sequence)
        assert 0 <= self.cache.num_coming(request, hit) < len(request.token_ids) - hit.num_tokens
        self.check_content(sequence, hit)
        room = self.pages.room(())
        if any(free < needed for free, needed in zip(room, self.pages.most_needed(hit, 40), strict=True)):
            return
        event("hit, copied" if hit.sources else "hit" if hit.num_tokens else "miss")
        self.waiting.remove(sequence)
        self.running.append(sequence)
        request.pages = self.pages.hold(hit)
        request.num_planned = hit.num_tokens
        request.num_prefill_tokens = len(request.token_ids)
        self.cache.start(request, hit)
        fronts = [list(self.cells[group][source]) for group, source in enumerate(hit.sources)]
        new_pages = self.plan(sequence, chunk)
        for group, front in enumerate(fronts):
            size = hit.num_tokens % BLOCK
            self.cells[group][new_pages[group][0]][:size] = front[:size]

    def plan(self, sequence, most):
        request = sequence.request
        start, num_tokens = request.num_planned, min(most, request.num_unplanned)
        new_pages = self.pages.extend(request.pages, start, num_tokens)
        for group, pages in enumerate(new_pages):
            for page in pages:
                assert not any(page in other.request.pages[group].pages for other in self.running if other != sequence)
                self.cells[group][page] = [None] * BLOCK
                self.known[group] = {key: known for key, known in self.known[group].items() if known != page}
            held = request.pages[group]
            for position in range(start, start + num_tokens):
                page = held.pages[position // BLOCK - held.num_left]
                self.cells[group][page][position % BLOCK] = sequence.content(position)
        request.num_planned += num_tokens
        request.num_pending += request.num_planned == request.num_future_tokens
        return new_pages

    @rule(num_steps=st.integers(1, 6), chunk=st.integers(1, CHUNK), results=st.booleans())
    def step(self, num_steps, chunk, results):
        for sequence in self.running * num_steps:
            request = sequence.request
            self.tell(sequence)
            self.cache.update(request)
            num_tokens = min(1 if request.is_decoding else chunk, request.num_unplanned)
            if num_tokens and self.pages.can_extend(request.pages, request.num_planned, num_tokens):
                self.plan(sequence, num_tokens)
            if results:
                self.result(sequence)

    def tell(self, sequence):
        """Note in the slow model what the index is told of: full pages of known tokens, and the page before the last
        token of the prompt."""
        request = sequence.request
        num_ready = min(request.num_planned, len(request.token_ids))
        ends = list(range(BLOCK, num_ready + 1, BLOCK))
        if num_ready >= request.num_prefill_tokens > 1 and not request.has_tail:
            ends.append(request.num_prefill_tokens - 1)
        for group, held in enumerate(request.pages):
            for end in ends:
                if (end - 1) // BLOCK >= max(held.num_left, request.num_indexed if end % BLOCK == 0 else 0):
                    page = held.pages[(end - 1) // BLOCK - held.num_left]
                    self.known[group].setdefault(sequence.content(end - 1), page)

    @rule()
    def results(self):
        for sequence in self.running + self.waiting:
            self.result(sequence)

    def result(self, sequence):
        request = sequence.request
        while request.num_pending:
            request.token_ids.append(sequence.answer[request.num_output_tokens])
            request.num_pending -= 1

    @rule(which=st.integers(0, 9), is_preempted=st.booleans())
    def end(self, which, is_preempted):
        if not self.running:
            return
        sequence = self.running[which % len(self.running)]
        self.tell(sequence)
        self.leave(sequence)
        if is_preempted and sequence.request.num_unplanned:
            self.waiting.append(sequence)

    def leave(self, sequence):
        self.cache.end(sequence.request)
        self.pages.release(sequence.request.pages)
        self.running.remove(sequence)
        sequence.request.pages, sequence.request.num_planned, sequence.request.num_prefill_tokens = [], 0, 0

    @rule(chance=st.integers(0, 5))
    def reset(self, chance):
        if chance:
            return
        self.maker.reset()
        self.pages.forget()
        self.num_resets += 1
        self.known = [{} for _ in self.groups]

    def slow_find(self, sequence):
        request = sequence.request
        if not request.may_reuse:
            return 0
        last = len(request.token_ids) - 1
        for end in [last, *range(last // BLOCK * BLOCK, 0, -BLOCK)]:
            if end and all(
                all(
                    sequence.content((number + 1) * BLOCK - 1) in known
                    for number in range(group.first_read(end), end // BLOCK)
                )
                and (end % BLOCK == 0 or sequence.content(end - 1) in known)
                for group, known in zip(self.groups, self.known, strict=True)
            ):
                return end
        return 0

    def check_content(self, sequence, hit: Hit):
        for group, (held, cells) in enumerate(zip(hit.pages, self.cells, strict=True)):
            assert held.num_left == self.groups[group].first_read(hit.num_tokens)
            for number, page in enumerate(held.pages, held.num_left):
                assert cells[page] == [sequence.content(number * BLOCK + offset) for offset in range(BLOCK)]
            for offset in range(hit.num_tokens % BLOCK):
                position = hit.num_tokens // BLOCK * BLOCK + offset
                assert cells[hit.sources[group]][offset] == sequence.content(position)

    @invariant()
    def a_sequence_has_its_own_content(self):
        for sequence in self.running:
            request = sequence.request
            for group, held, cells in zip(self.groups, request.pages, self.cells, strict=True):
                first = group.first_read(max(0, request.num_planned - 1)) * BLOCK
                for position in range(max(first, held.num_left * BLOCK), request.num_planned):
                    page = held.pages[position // BLOCK - held.num_left]
                    assert cells[page][position % BLOCK] == sequence.content(position)

    @invariant()
    def nothing_leaks(self):
        for group, pool in enumerate(self.pages.pools):
            held = {page for sequence in self.running for page in sequence.request.pages[group].pages}
            assert pool.num_used == len(held)

    def teardown(self):
        if hasattr(self, "cache"):
            for sequence in list(self.running):
                self.leave(sequence)
            assert all(pool.num_free == pool.num_pages for pool in self.pages.pools)
            assert not self.cache._coming


PrefixCaches.TestCase.settings = settings(deadline=None, max_examples=200, stateful_step_count=50)
test_prefix_caches = PrefixCaches.TestCase


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"capacity_factor": 1.5}, None),
        ({"enable_prefix_caching": False}, "enable_prefix_caching is false"),
        ({"record_trace": "t.npz"}, "record_trace needs the experts of every token"),
        ({"capacity_factor": 1.5, "overflow": "drop"}, "with overflow 'drop', tokens depend on the batch"),
        ({"ep_size": 2, "balance_epsilon": 0.1}, "with balance_epsilon, tokens depend on the batch"),
    ],
)
def test_why_it_is_off(options, reason):
    assert why_off(EngineConfig("m", **options)) == reason


def test_with_dynamic_rope_keys_depend_on_the_length_of_the_prompt():
    for with_length in (False, True):
        keys = [KeyMaker(BLOCK, with_length).keys(length, None, None).full([1] * 8, 2) for length in (8, 9)]
        assert (keys[0] != keys[1]) == with_length
