"""Plans the steps: which sequences, which token ranges, which pages, on which rank. No torch.

Every sequence runs on one rank, which holds its pages. A step first runs the rank's sequences in order of priority,
then of arrival. Each decoding sequence gets one row; prompts share the rest of the token budget, in chunks. Then the
scheduler admits waiting requests, in the order of `waiting.py`. When a rank runs out of pages, the scheduler preempts
the last of its sequences. The front keeps its tokens, so it is recomputed later and continues with the same result.

The first tokens of a request need not run if pages have their keys and values (`prefix_cache.py`). The rank that has
most of them is preferred (`rank_choice.py`).

Counts run ahead of results, so that one step can be planned while another runs: a decode row names its sequence, and
the rank knows the token. If that token ended the request, the engine discards the row planned after it.

Pages become free as soon as a sequence ends, is preempted or has left them behind its window, although submitted steps
may still use them. This is safe: a rank runs its plans in order, so the next holder's rows come after all rows of the
previous holder. For the same reason a page may be shared as soon as the step that fills it was submitted.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import ge

from moe_runtime.engine.overload import OverloadRouting
from moe_runtime.engine.page_pool import Hit, RankPages
from moe_runtime.engine.prefix_cache import PrefixCache
from moe_runtime.engine.rank_choice import Offer, best_offer
from moe_runtime.engine.request import Request
from moe_runtime.engine.stats import OverloadCounts, PageCounts, PrefixCounts
from moe_runtime.engine.step_shapes import StepShapes
from moe_runtime.engine.step_time import StepTime
from moe_runtime.engine.waiting import Waiting
from moe_runtime.memory.page_group import PageGroup
from moe_runtime.wire.messages import Chunk, NewSequence, PageCopy, RankPlan, StepPlan


@dataclass(eq=False)
class RankState:
    """The front's view of a rank: its pages and which prefixes are in them, its running sequences by `Request.order`,
    and sequences to drop."""

    pages: RankPages
    prefixes: PrefixCache
    running: list[Request] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Draft:
    """A rank's share of the step that is being planned.

    `prompt_budget`: tokens left for prompts. `asks_gates`: a request has an expert policy or returns routed experts.
    """

    prompt_budget: int
    asks_gates: bool = False
    decode: list[Chunk] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    new_sequences: list[NewSequence] = field(default_factory=list)
    page_copies: list[PageCopy] = field(default_factory=list)
    num_tokens: int = 0


class Scheduler:
    """All unfinished requests, and where they are.

    Args:
        num_pages: of each rank's KV cache: the pages of each page group.
        groups: the page groups.
        max_num_seqs: maximum sequences on a rank.
        max_num_batched_tokens: maximum tokens of a rank in a step, at least `max_num_seqs`.
        shapes: chooses each step's dispatcher and bucket.
        step_time: bounds the prompt tokens of steps that have decode rows.
        overload: lowers the experts per token of new requests while the queue is long; None never does.
    """

    def __init__(
        self,
        num_pages: Sequence[Sequence[int]],
        groups: Sequence[PageGroup],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        shapes: StepShapes,
        step_time: StepTime,
        overload: OverloadRouting | None = None,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs
        self.waiting = Waiting()
        rank_pages = [RankPages(groups, counts) for counts in num_pages]
        self.ranks = [RankState(pages, PrefixCache(pages)) for pages in rank_pages]
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_admitted = 0  # without those that come back
        self.step_time = step_time
        self.overload = overload
        self._groups = groups
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._shapes = shapes

    @property
    def num_running(self) -> int:
        return sum(len(rank.running) for rank in self.ranks)

    def overload_counts(self) -> OverloadCounts:
        """What `overload_routing` has done."""
        overload = self.overload
        return OverloadCounts() if overload is None else OverloadCounts(overload.is_active, overload.num_requests)

    def page_counts(self) -> tuple[PageCounts, ...]:
        """Pages of each page group, on all ranks together."""
        return tuple(
            PageCounts(group.window, sum(pool.num_pages for pool in pools), sum(pool.num_used for pool in pools))
            for group, *pools in zip(self._groups, *(rank.pages.pools for rank in self.ranks), strict=True)
        )

    def prefix_counts(self) -> PrefixCounts:
        """Counts of the prefix cache since the start, on all ranks together."""
        return sum((rank.prefixes.counts() for rank in self.ranks), PrefixCounts())

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        for rank in self.ranks:
            rank.pages.forget()

    def add(self, request: Request) -> None:
        """Enqueue a new request."""
        self.waiting.add(request)

    def remove(self, request: Request) -> None:
        """Remove a request that has ended, in any state. Its pages become free at once.

        Its rank learns of it with the next step. Until then the rank keeps the list of tokens, but no page.
        """
        if request.rank is None:
            self.waiting.remove(request)
        else:
            self.ranks[request.rank].running.remove(request)
            self._release(request)

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None if there is nothing to run now."""
        drafts = self._plan_all_running()
        self._admit(drafts)
        if self.overload is not None:
            self.overload.note(len(self.waiting))
        tokens_per_rank = [draft.num_tokens for draft in drafts]
        if not any(tokens_per_rank):
            return None
        most_decode = max(len(draft.decode) for draft in drafts)
        self.step_time.planned(most_decode, max(draft.num_tokens - len(draft.decode) for draft in drafts))
        plans = []
        for rank, draft in zip(self.ranks, drafts, strict=True):
            chunks = draft.decode + draft.prefill
            plans.append(
                RankPlan(
                    draft.new_sequences,
                    rank.dropped,
                    chunks,
                    num_decode=len(draft.decode),
                    page_copies=draft.page_copies,
                )
            )
            rank.dropped = []
        self.num_steps += 1
        plain = not any(draft.prefill or draft.asks_gates for draft in drafts)
        dispatcher, bucket = self._shapes.choose(tokens_per_rank, plain)
        return StepPlan(self.num_steps, dispatcher, tokens_per_rank, bucket=bucket, ranks=plans)

    def _plan_all_running(self) -> list[Draft]:
        """Plan the running sequences. Ranks wait for each other, so decode rows of one bound the prompts of all."""
        num_decode = [sum(each.is_decoding and each.num_unplanned > 0 for each in rank.running) for rank in self.ranks]
        bound = self.step_time.prompt_budget(max(num_decode))
        drafts = [self._plan_running(*each, bound) for each in zip(self.ranks, num_decode, strict=True)]
        if bound == 0 and not any(draft.num_tokens for draft in drafts):  # all decode rows were preempted
            return self._plan_all_running()
        return drafts

    def _plan_running(self, rank: RankState, num_decode: int, bound: int | None) -> Draft:
        # Decode rows come first; prompts share the remaining budget. There are at most `max_num_seqs` decode rows, and
        # fewer while a prompt is in progress, so a prompt makes progress, except where `bound` is 0 for once.
        left = self._max_num_batched_tokens - num_decode
        draft = Draft(prompt_budget=left if bound is None else min(left, bound))
        position = 0
        while position < len(rank.running):  # preemption takes from the end, where nothing is planned yet
            request = rank.running[position]
            position += 1
            rank.prefixes.update(request)
            num_tokens = request.num_unplanned
            if not request.is_decoding:
                num_tokens = min(num_tokens, draft.prompt_budget)
            if num_tokens > 0 and self._make_room(rank, request, num_tokens):
                self._add_chunk(draft, request, num_tokens)
        return draft

    def _make_room(self, rank: RankState, request: Request, num_tokens: int) -> bool:
        """Preempt the last sequences until `request` has its pages. False if `request` itself was preempted."""
        while not rank.pages.can_extend(request.pages, request.num_planned, num_tokens):
            victim = rank.running.pop()
            self._release(victim)
            self.waiting.add(victim)
            self.num_preemptions += 1
            if victim is request:
                return False
        return True

    def _admit(self, drafts: list[Draft]) -> None:
        """Admit waiting requests in their order. The first one that does not fit also blocks all later ones. One that
        waits for pages of a running prompt does not, unless `max_num_seqs` of them do.

        A request needs pages for all its tokens, plus one page for each running sequence that will take one; otherwise
        it would soon be preempted for them. On an idle rank any request fits. A rank whose prompts do not have all
        their pages yet has no budget left, so it admits none.
        """
        if not self.waiting:
            return
        room = [rank.pages.room((each.pages, each.max_tokens) for each in rank.running) for rank in self.ranks]
        loads = [sum(request.num_remaining for request in rank.running) for rank in self.ranks]
        passed: list[Request] = []
        while (request := self.waiting.next()) is not None:
            if self.overload is not None:
                self.overload.choose(request)
            if request.num_pending or len(passed) == self._max_num_seqs:
                break  # a preempted one waits for its token that is still in flight
            offer = best_offer(self._offers(request, drafts, room, loads))
            if offer is None:
                break
            if offer.waits:
                self.waiting.set_aside(request)
                passed.append(request)
                continue
            index = offer.rank
            for group, needed in enumerate(offer.needed):
                most, now = (self._groups[group].most(n) for n in (request.max_tokens, len(request.token_ids)))
                room[index][group] -= needed + min(1, most - now)
            self._start(request, index, offer.hit, drafts[index])
            loads[index] += request.num_remaining
        for request in passed:
            self.waiting.put_back(request)

    def _offers(
        self, request: Request, drafts: list[Draft], room: list[list[int]], loads: list[int]
    ) -> Iterator[Offer]:
        """The ranks with a seat, and with pages for all tokens of a request."""
        num_tokens = len(request.token_ids)
        for index, (rank, draft) in enumerate(zip(self.ranks, drafts, strict=True)):
            if len(rank.running) >= self._max_num_seqs:
                continue
            hit = rank.prefixes.find(request)
            needed = rank.pages.most_needed(hit, num_tokens)
            if all(map(ge, room[index], needed)):
                yield Offer(
                    rank=index,
                    hit=hit,
                    num_coming=rank.prefixes.num_coming(request, hit),
                    num_tokens=num_tokens,
                    load=loads[index] + draft.num_tokens,
                    needed=needed,
                    spare=min(room[index]),
                    has_budget=draft.prompt_budget > 0,
                    block_size=self._groups[0].block_size,
                )

    def _start(self, request: Request, index: int, hit: Hit, draft: Draft) -> None:
        rank = self.ranks[index]
        self.waiting.admit(request)
        insort(rank.running, request, key=lambda running: running.order)
        request.rank = index
        request.pages = rank.pages.hold(hit)
        request.num_planned = hit.num_tokens
        request.num_prefill_tokens = len(request.token_ids)
        if request.scheduled_at is None:
            request.scheduled_at = time.monotonic()
            request.num_cached_tokens = hit.num_tokens
            self.num_admitted += 1
        rank.prefixes.start(request, hit)
        draft.new_sequences.append(
            NewSequence(
                request.seq_id,
                list(request.token_ids),
                request.num_prompt_tokens,
                request.params,
                request.seed,
                pages=[[0] * held.num_left + held.pages for held in request.pages],
                grammar=request.grammar,
            )
        )
        chunk = self._add_chunk(draft, request, min(request.num_unplanned, draft.prompt_budget))
        draft.page_copies += [
            PageCopy(group, source, chunk.new_pages[group][0]) for group, source in enumerate(hit.sources)
        ]

    def _add_chunk(self, draft: Draft, request: Request, num_tokens: int) -> Chunk:
        assert request.rank is not None
        start = request.num_planned
        is_decoding = request.is_decoding
        new_pages = self.ranks[request.rank].pages.extend(request.pages, start, num_tokens)
        request.num_planned += num_tokens
        self.waiting.charge(request, num_tokens)
        sample = request.num_planned == request.num_future_tokens
        request.num_pending += sample
        chunk = Chunk(request.seq_id, start, num_tokens, new_pages, sample)
        draft.num_tokens += num_tokens
        params = request.params
        draft.asks_gates |= params.routing is not None or params.return_routed_experts
        if is_decoding:
            draft.decode.append(chunk)
        else:
            draft.prefill.append(chunk)
            draft.prompt_budget -= num_tokens
        return chunk

    def _release(self, request: Request) -> None:
        assert request.rank is not None
        rank = self.ranks[request.rank]
        rank.prefixes.end(request)
        rank.pages.release(request.pages)
        rank.dropped.append(request.seq_id)
        request.rank = None
        request.pages = []
        request.num_planned = 0
        request.num_prefill_tokens = 0
