"""An engine without a model: each step gives every request the next number as its token."""

import itertools
import math
import threading
import time
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace

import numpy as np

from moe_runtime.balancer.live.mover import Rebalance
from moe_runtime.balancer.live.rebalancer import BalancerStats
from moe_runtime.balancer.load import ExpertLoad
from moe_runtime.balancer.placement import Placement
from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.request_rules import RequestRules
from moe_runtime.engine.stats import EngineStats, PageCounts, PrefixCounts
from moe_runtime.text.tokenizer import RenderedPrompt
from moe_runtime.types.outputs import ExpertChanges, Logprob, OutputDelta
from moe_runtime.wire.executor import RankError

VOCAB = 1000
MAX_MODEL_LEN = 200
DEADLINE = 20.0
RANK_ERROR = "rank 1 (pid 4242) was killed by SIGKILL"


def wait_until(condition, what):
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)


class FakeTokenizer:
    """A token per word, the word's length."""

    has_chat_template = True
    chat_template = None
    special_ids = frozenset()
    added_tokens = MappingProxyType({})
    max_token_bytes = 100

    def encode(self, text, add_special_tokens=True):
        return [len(word) for word in text.split()]

    def encode_batch(self, texts, add_special_tokens=True):
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, token_ids, skip_special_tokens=True):
        return " ".join("x" * token_id for token_id in token_ids)

    def pieces(self, token_ids):
        return ["x" * token_id for token_id in token_ids]

    def token_text(self, token_id):
        return f" {token_id}"

    def token_bytes(self, token_id):
        return self.token_text(token_id).encode()

    def __init__(self):
        self.rendered = []

    def apply_chat_template(self, messages, **options):
        return self.render_chat(messages, **options)

    def render_chat(self, messages, **options):
        self.rendered.append({"messages": messages, **options})
        if not messages:
            raise ValueError("messages: [] is not allowed; it must be a list with at least one message")
        if messages[0]["role"] == "assistant":
            raise ValueError("messages: the chat template fails: the user speaks first")
        token_ids = [token for m in messages for token in (len(m["role"]), *self.encode(m["content"] or ""))]
        return RenderedPrompt("", token_ids)


@dataclass
class FakeRequest:
    num_prompt_tokens: int
    next_token: int
    max_tokens: int
    params: object
    num_output_tokens: int = 0
    scheduled_at: float = field(default_factory=time.monotonic)


@dataclass
class FakeEngine:
    """If given, each step needs one release of `allow`. It fails at step `die_at`; a step takes `step_seconds`.

    Each request has `expert_changes`.
    """

    config: EngineConfig = field(
        default_factory=lambda: EngineConfig("fake-model", ep_size=2, skip_tokenizer_init=False)
    )
    tokenizer: object = field(default_factory=FakeTokenizer)
    allow: threading.Semaphore | None = None
    die_at: float = math.inf
    die_with: BaseException = field(default_factory=lambda: RankError(RANK_ERROR))
    step_seconds: float = 0.0
    max_model_len: int = MAX_MODEL_LEN
    expert_changes: ExpertChanges | None = None
    refuses: str | None = None  # a request id
    script: list[str] | None = None  # the texts of the tokens, in place of numbers; then the output stops
    model_config: object = field(
        default_factory=lambda: SimpleNamespace(vocab_size=VOCAB, default_sampling={}, family="fake")
    )
    grammars: None = None

    def __post_init__(self):
        self.running = {}
        self.added, self.users, self.salts, self.aborted = [], [], [], []
        self.num_steps = 0
        self.num_tokens = 0
        self.closed = False
        self.rank_is_dead = False
        self.executor = self
        self.threads = set()
        self.rebalancing, self.num_tends = None, 0
        self.num_resets = 0
        self.is_warm = False

    def warm_up(self):
        self.is_warm = True

    def check(self):
        self.threads.add(threading.current_thread().name)
        if self.rank_is_dead:
            raise self.die_with

    @property
    def rules(self):
        return RequestRules(VOCAB, self.max_model_len, True, SimpleNamespace(resolve=lambda asked: None))

    def add_request(self, request_id, prompt, params, user="", shown_ids=frozenset(), cache_salt=None, arrived_at=None):
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        self.rules.check(prompt, params)
        if request_id == self.refuses:
            raise ValueError(f"request_id: {request_id!r} is in use")
        room = self.max_model_len - len(prompt)
        self.added.append((request_id, prompt, params))
        self.salts.append(cache_salt)
        self.users.append(user)
        self.running[request_id] = FakeRequest(
            len(prompt), prompt[-1] + 1, min(room, params.max_tokens or room), params
        )

    def abort(self, request_id):
        if self.running.pop(request_id, None):
            self.aborted.append(request_id)

    @property
    def has_work(self):
        return bool(self.running)

    def step(self):
        if self.allow is not None:
            assert self.allow.acquire(timeout=DEADLINE)
        time.sleep(self.step_seconds)
        self.num_steps += 1
        if self.num_steps >= self.die_at:
            raise self.die_with
        return [self._advance(request_id, request) for request_id, request in list(self.running.items())]

    def _advance(self, request_id, request):
        token = request.next_token % VOCAB
        request.next_token += 1
        request.num_output_tokens += 1
        self.num_tokens += 1
        params = request.params
        finish_reason = stop_reason = None
        text = f" {token}"
        if self.script is not None:
            text = self.script[request.num_output_tokens - 1]
            finish_reason = "stop" if request.num_output_tokens == len(self.script) else None
            if finish_reason is None and request.num_output_tokens == request.max_tokens:
                finish_reason = "length"
        elif token in params.stop_token_ids:
            finish_reason, stop_reason = "stop", token
        elif request.num_output_tokens == request.max_tokens:
            finish_reason = "length"
        if finish_reason:
            del self.running[request_id]
        is_first = request.num_output_tokens == 1
        prompt_logprobs = None
        if is_first and params.prompt_logprobs is not None:
            prompt_logprobs = [None] + [fake_logprobs(7, params.prompt_logprobs)] * (request.num_prompt_tokens - 1)
        return OutputDelta(
            request_id=request_id,
            text=text,
            token_ids=[token],
            logprobs=None if params.logprobs is None else [fake_logprobs(token, params.logprobs)],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=request.num_output_tokens,
            prompt_token_ids=[0] if is_first else None,
            prompt_logprobs=prompt_logprobs,
            expert_changes=self.expert_changes if finish_reason else None,
            scheduled_at=request.scheduled_at if is_first else None,
            num_cached_tokens=request.num_prompt_tokens - 1,
        )

    def stats(self):
        return EngineStats(
            num_running=len(self.running),
            num_waiting=0,
            page_counts=(PageCounts(None, 8, len(self.running)),),
            num_preemptions=3,
            prompt_tokens=sum(len(prompt) for _, prompt, _ in self.added),
            generation_tokens=self.num_tokens,
            steps=self.num_steps,
            dispatcher_steps={"all_to_all": self.num_steps},
            finished={},
            last_step_seconds=self.step_seconds,
            expert_changes=self.expert_changes or ExpertChanges(),
            extra_rounds=5,
            prefix_cache=PrefixCounts(100, 60, 7),
            balancer=BalancerStats(2, 3, 4000, 1, 0.75, 0.875, [6.0, 2.0], self.is_migrating),
        )

    def reset_prefix_cache(self):
        self.num_resets += 1

    def expert_load(self):
        tokens = {"prefill": np.array([[4, 0, 0, 0], [1, 1, 1, 1]]), "decode": np.array([[3, 1, 2, 2], [8, 0, 0, 0]])}
        return ExpertLoad(tokens, (1, 3), self.placement(), "fake-model", 2)

    def placement(self):
        return Placement.even((1, 3), 4, 2)

    def decisions(self):
        return [{"reason": "pays back", "num_moves": 3}]

    def rebalance(self, dry_run):
        if self.is_migrating:
            raise ValueError("rebalance: a migration is under way; wait until it has ended")
        self.rebalancing = Rebalance(dry_run, 0.5, 0.9, planned_moves=3, done=dry_run)
        return self.rebalancing

    @property
    def is_migrating(self):
        return self.rebalancing is not None and not self.rebalancing.done

    def tend(self):
        self.check()
        if self.is_migrating and self.num_tends >= 3:
            self.rebalancing.done, self.rebalancing.balancedness_after = True, 0.9
        self.num_tends += 1

    def health(self):
        return {"model": "fake-model", "ep_size": 2, "placement_invariance": "greedy tokens, float32"}

    def close(self):
        self.closed = True


def fake_logprobs(token, num_best):
    """The chosen token at rank 3, and the best ones; the third of these is again the chosen token."""
    best = itertools.islice(((token + 100 + rank, rank) for rank in itertools.count(1) if rank != 3), num_best)
    entries = {token: Logprob(-math.inf if token == 13 else -3.0, 3, f" {token}")}
    return entries | {other: Logprob(-float(rank), rank, f" {other}") for other, rank in best}
