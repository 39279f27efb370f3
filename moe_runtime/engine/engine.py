"""The engine: takes requests and turns them into tokens step by step. It imports no torch itself.

One thread drives it; HTTP reaches it through messages. The engine holds all state of a request that cannot be
recomputed: the prompt, the tokens so far, the seed and the sampling parameters.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Set
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.expert_policy import policies_of
from moe_runtime.config.model import ModelConfig
from moe_runtime.engine.deadlines import Deadlines
from moe_runtime.engine.health import describe
from moe_runtime.engine.intake import Intake
from moe_runtime.engine.logprob_output import add_prompt_logprobs, position_logprobs
from moe_runtime.engine.overload import overload_routing
from moe_runtime.engine.prefix_cache import KeyMaker
from moe_runtime.engine.request import Request
from moe_runtime.engine.request_rules import RequestRules
from moe_runtime.engine.routed_output import add_routed, routed_output
from moe_runtime.engine.scheduler import Scheduler
from moe_runtime.engine.stats import EngineStats
from moe_runtime.engine.step_news import StepNews
from moe_runtime.engine.step_shapes import StepShapes
from moe_runtime.engine.step_time import StepTime
from moe_runtime.engine.warm_up import warm_up_requests
from moe_runtime.grammars.compile import GrammarCompiler
from moe_runtime.memory.page_group import page_groups
from moe_runtime.types.outputs import ExpertChanges, OutputDelta, PositionLogprobs
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.executor import Executor
from moe_runtime.wire.messages import RankResult, Sample, StepPlan

if TYPE_CHECKING:
    import numpy as np

    from moe_runtime.balancer.live.mover import Rebalance
    from moe_runtime.balancer.load import ExpertLoad
    from moe_runtime.balancer.placement import Placement
    from moe_runtime.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

NOT_FINITE = "the model's logits after token {} are NaN or infinite; its weights may be damaged"


class Engine:
    """Serves one model on the ranks of an executor.

    Args:
        config: what the user asked for.
        model_config: the checkpoint.
        executor: ranks that are ready. Once the engine is made, it owns the executor and closes it.
        tokenizer: None accepts and returns token ids only.
    """

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, executor: Executor, tokenizer: Tokenizer | None
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.executor = executor
        self.tokenizer = tokenizer
        self.max_model_len = config.max_model_len or model_config.max_model_len
        groups = page_groups(config, model_config)
        for rank in executor.ranks:
            fits = [have >= each.most(self.max_model_len) for have, each in zip(rank.num_pages, groups, strict=True)]
            assert all(fits), "one sequence always fits on a rank"
        policies = policies_of(config, model_config)
        self._scheduler = Scheduler(
            [rank.num_pages for rank in executor.ranks],
            groups,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            StepShapes(
                config.dispatcher,
                set.intersection(*(set(rank.dispatchers) for rank in executor.ranks)),
                sorted(set.intersection(*(set(rank.buckets) for rank in executor.ranks))),
            ),
            StepTime(config.decode_slowdown),
            overload_routing(config, policies),
        )
        self._deadlines = Deadlines(config.queue_timeout)
        from moe_runtime.balancer.live.rebalancer import Rebalancer  # numpy: importing moe_runtime stays light
        from moe_runtime.engine.trace_recorder import TraceRecorder

        self.rebalancer = Rebalancer(config, model_config, executor)
        self.rules = RequestRules(model_config.vocab_size, self.max_model_len, tokenizer is not None, policies)
        self._key_maker = KeyMaker.of(config, model_config)
        self.grammars = None
        if tokenizer is not None:
            self.grammars = GrammarCompiler(partial(tokenizer.vocabulary, model_config.eos_token_ids))
        self._news = StepNews(self.grammars)
        self._intake = Intake(tokenizer, self.rules, config.seed, self._key_maker, self.grammars)
        trace = config.record_trace
        self._recorder = None if trace is None else TraceRecorder(trace, model_config, self.model_name)
        self._changes_experts = config.limits is not None and config.limits.changes_experts
        self._num_requests = 0
        self._requests: dict[str, Request] = {}
        self._by_seq_id: dict[int, Request] = {}
        self._num_inflight = 0
        self._ready: list[OutputDelta] = []
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._dispatcher_steps: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._last_step_seconds = 0.0
        self._rank_rows: list[list[int]] = []  # of the last step whose results are known
        self._expert_changes = ExpertChanges()
        self._extra_rounds = 0

    def warm_up(self) -> None:
        """Run a few prompts, so that the first request waits no longer than later ones. Call before any request.

        Another engine on the same ranks runs them. They leave nothing here: no counts, pages, random numbers or trace.

        Raises:
            RankError: as `step`.
        """
        other = Engine(replace(self.config, record_trace=None), self.model_config, self.executor, self.tokenizer)
        requests = warm_up_requests(len(self.executor.ranks), self.model_config.vocab_size, self.max_model_len)
        for index, (prompt, params) in enumerate(requests):
            other.add_request(f"warm-up-{index}", prompt, params)
        while other.has_work:
            other.step()
        self.executor.forget()
        if self.tokenizer is not None:
            self.tokenizer.warm_up()

    def add_request(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        user: str = "",
        shown_ids: Set[int] = frozenset(),
        cache_salt: str | None = None,
        arrived_at: float | None = None,
    ) -> None:
        """Enqueue a request for one continuation; `step` returns its tokens.

        Args:
            user: who takes a turn with it when requests wait.
            shown_ids: special tokens that stay in the text in spite of `skip_special_tokens`.
            cache_salt: the request shares pages of the prefix cache only with requests of the same salt.
            arrived_at: the `time.monotonic()` from which its timeouts count; None is now.

        Raises:
            ValueError: the prompt or the parameters cannot be served. The request is not enqueued.
        """
        if request_id in self._requests or any(delta.request_id == request_id for delta in self._ready):
            raise ValueError(f"request_id: {request_id!r} is in use")
        now = time.monotonic() if arrived_at is None else arrived_at
        request = self._intake.request(request_id, self._num_requests, prompt, params, now, user, shown_ids, cache_salt)
        self._num_requests += 1
        self._requests[request_id] = request
        self._by_seq_id[request.seq_id] = request
        self._scheduler.add(request)
        self._deadlines.add(request)

    def token_ids(self, prompt: str | list[int]) -> list[int]:
        """A prompt's token ids. Raises ValueError if it is a text and there is no tokenizer, or it is no Unicode."""
        return self._intake.token_ids(prompt)

    def abort(self, request_id: str) -> None:
        """End a request. Its pages become free at once; the next step returns its last delta, "abort".

        An unknown or finished id is ignored.
        """
        request = self._requests.get(request_id)
        if request is not None:
            self._ready.append(self._without_token(request, "abort"))

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to run or to return."""
        return bool(self._requests or self._num_inflight or self._ready)

    def step(self) -> list[OutputDelta]:
        """Plan as many steps as may be in flight, await the oldest, and return what it added to each request.

        Raises:
            RankError: a rank died, reported an error or did not answer in time.
        """
        for request, finish_reason, error in self._deadlines.late(time.monotonic()):
            self._ready.append(self._without_token(request, finish_reason, error))
        while self._num_inflight < self.executor.max_inflight and (plan := self._scheduler.schedule()) is not None:
            self.executor.submit(self._news.add_to(self._with_loads(self.rebalancer.prepare(plan))))
            self._num_inflight += 1
            self._dispatcher_steps[plan.dispatcher] += 1
        assert self._num_inflight or not self._requests, "there are requests, and none can run"
        if self._num_inflight:
            self._collect()
        self.rebalancer.tick()
        deltas, self._ready = self._ready, []
        return deltas

    def tend(self) -> None:
        """Do the work that needs no requests: check that the ranks are alive, and continue a migration of experts.

        Raises:
            RankError: a rank has died.
        """
        self.executor.check()
        self.rebalancer.tick(idle=not self.has_work)

    def rebalance(self, dry_run: bool = False) -> Rebalance:
        """Plan a better placement for the recent load and, unless `dry_run`, start moving experts there.

        `Rebalance.done` says when it is finished. `step`, or `tend` without requests, continues it. No token changes.

        Raises:
            ValueError: there is one rank, or experts are moving already.
            RankError: as `step`.
        """
        self.rebalancer.take_counts(self._counts())
        return self.rebalancer.begin(dry_run)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes: requests that are added from now on find no page of earlier ones."""
        if self._key_maker is not None:
            self._key_maker.reset()
            self._scheduler.forget_prefixes()

    def stats(self) -> EngineStats:
        """Counts since the start. A cheap call."""
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=len(self._scheduler.waiting),
            page_counts=self._scheduler.page_counts(),
            num_preemptions=self._scheduler.num_preemptions,
            num_admitted=self._scheduler.num_admitted,
            overload=self._scheduler.overload_counts(),
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._scheduler.num_steps,
            dispatcher_steps=dict(self._dispatcher_steps),
            finished=dict(self._finished),
            last_step_seconds=self._last_step_seconds,
            balancer=self.rebalancer.stats(),
            expert_changes=self._expert_changes,
            extra_rounds=self._extra_rounds,
            prefix_cache=self._scheduler.prefix_counts(),
        )

    def expert_load(self) -> ExpertLoad:
        """Tokens per layer and expert since the start. Awaits the steps in flight; `step` returns their results later.

        Raises:
            RankError: as `step`.
        """
        from moe_runtime.balancer.load import ExpertLoad

        prefill_LE, decode_LE = self._counts().sum(axis=0)
        return ExpertLoad(
            tokens={"prefill": prefill_LE, "decode": decode_LE},
            layer_ids=self.model_config.moe_layers,
            placement=self.placement(),
            model=self.model_name,
            top_k=self.model_config.moe.top_k,
        )

    def placement(self) -> Placement:
        """Which expert sits on which rank."""
        return self.rebalancer.placement

    @property
    def is_migrating(self) -> bool:
        """Whether experts are moving. Then `tend` must be called even without requests."""
        return self.rebalancer.is_migrating

    def decisions(self) -> list[dict[str, object]]:
        """The balancer's recent decisions, newest last, with the figures that led to them."""
        return list(self.rebalancer.decisions)

    @property
    def model_name(self) -> str:
        """The name that users see."""
        return self.config.served_model_name or self.config.model

    def health(self) -> dict[str, object]:
        """The engine's choices and guarantees, as plain values."""
        return {
            "model": self.model_name,
            "max_model_len": self.max_model_len,
            **describe(self.config, self.model_config, self.executor.ranks, self.stats()),
        }

    def _counts(self) -> np.ndarray:
        """Counts of experts since the start, [W, 2, L, E]; awaits the steps in flight."""
        while self._num_inflight:
            self._collect()
        return self.executor.expert_counts()

    def close(self) -> None:
        """End the ranks. Unfinished requests get no more deltas. May be called twice."""
        self.executor.close()
        if self._recorder is not None:
            self._recorder.save()

    def _with_loads(self, plan: StepPlan) -> StepPlan:
        return plan if self.config.balance_epsilon is None else replace(plan, rank_rows=self._rank_rows)

    def _collect(self) -> None:
        """Wait for the oldest step and process its results."""
        results = self.executor.collect()
        self._num_inflight -= 1
        self._last_step_seconds = max(result.seconds for result in results)
        self._scheduler.step_time.took(self._last_step_seconds)
        self.rebalancer.note(results)
        self._rank_rows = [result.expert_rows for result in results]
        self._extra_rounds += results[0].extra_rounds
        if self._recorder is not None:
            self._recorder.add(results)
        for result in results:
            self._take_in(result)

    def _take_in(self, result: RankResult) -> None:
        # A request that is not found has ended or was aborted while this step was planned or ran.
        for found in result.prompt_logprobs:
            if (request := self._by_seq_id.get(found.seq_id)) is not None:
                add_prompt_logprobs(request, found, self.tokenizer)
        self._add_expert_changes(result)
        for routed in result.routed_experts:
            if (request := self._by_seq_id.get(routed.seq_id)) is not None and request.params.return_routed_experts:
                add_routed(request, routed, self.model_config)
        for sample in result.samples:
            if (request := self._by_seq_id.get(sample.seq_id)) is not None:
                self._ready.append(self._add_token(request, sample))

    def _add_expert_changes(self, result: RankResult) -> None:
        for found in result.expert_changes:
            self._expert_changes += found.changes
            if (request := self._by_seq_id.get(found.seq_id)) is not None:
                request.expert_changes += found.changes

    def _add_token(self, request: Request, sample: Sample) -> OutputDelta:
        if sample.token_id < 0:
            error = NOT_FINITE.format(len(request.token_ids))
            logger.warning("request %s: %s", request.request_id, error)
            return self._without_token(request, "error", error)
        if sample.error:
            return self._without_token(request, "error", f"the output's grammar cannot be followed: {sample.error}")
        if request.params.max_tokens == 0:
            self._prompt_tokens += request.num_prompt_tokens
            return self._without_token(request, "length")
        finish_reason, stop_reason = request.append(sample.token_id, self.model_config.eos_token_ids)
        self._generation_tokens += 1
        if request.num_output_tokens == 1:
            self._prompt_tokens += request.num_prompt_tokens
        logprobs = None
        if request.params.logprobs is not None:
            assert sample.logprobs is not None
            logprobs = [position_logprobs(sample.logprobs, self.tokenizer)]
        if finish_reason is not None:
            self._end(request, finish_reason)
        delta = request.delta([sample.token_id], logprobs, finish_reason, stop_reason)
        return delta if finish_reason is None else self._last_delta(request, delta)

    def _without_token(self, request: Request, finish_reason: str, error: str | None = None) -> OutputDelta:
        """End a request. Returns its last delta."""
        self._end(request, finish_reason)
        logprobs: list[PositionLogprobs] | None = None if request.params.logprobs is None else []
        return self._last_delta(request, request.delta([], logprobs, finish_reason, error=error))

    def _last_delta(self, request: Request, delta: OutputDelta) -> OutputDelta:
        """`delta` with the fields that only a request's last delta has."""
        changes = request.expert_changes if self._changes_experts else None
        routed = routed_output(request, self.model_config)
        return replace(delta, routed_experts=routed, expert_changes=changes, overload_routing=request.overload_routing)

    def _end(self, request: Request, finish_reason: str) -> None:
        self._scheduler.remove(request)
        self._deadlines.remove(request)
        del self._requests[request.request_id], self._by_seq_id[request.seq_id]
        self._finished[finish_reason] += 1
