"""Whatever requests arrive, and whenever: an engine's tokens are those of each request alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

from fakes import EOS, VOCAB_SIZE, fake_logprobs, generate_alone, make_engine
from hypothesis import event, given, settings
from hypothesis import strategies as st

from moe_runtime.engine.engine import Engine
from moe_runtime.engine.step_time import StepTime
from moe_runtime.memory.page_group import PageGroup
from moe_runtime.types.outputs import OutputDelta
from moe_runtime.types.sampling_params import SamplingParams


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    params: SamplingParams
    abort_after: int | None  # steps
    salt: str | None


@st.composite
def arrivals(draw: st.DrawFn, max_model_len: int) -> Arrival:
    length = draw(st.integers(1, max(1, max_model_len // 2)) | st.integers(1, max_model_len - 1))
    rng = random.Random(draw(st.integers(0, 10**6)))
    texts = random.Random(0)  # of few beginnings and many ends
    text = [texts.randrange(1, VOCAB_SIZE) for _ in range(3 * max_model_len)]
    first = draw(st.sampled_from([0, 0, max_model_len]))
    num_shared = draw(st.integers(0, length) | st.just(length))
    params = SamplingParams(
        max_tokens=draw(st.none() | st.just(25) | st.integers(1, 30)),
        seed=draw(st.integers(0, 3)),
        ignore_eos=draw(st.sampled_from([True, True, False])),
        priority=draw(st.sampled_from([0, 0, 0, -1, 3])),
        stop_token_ids=draw(st.sampled_from([(), (), (), (1, 2, 3)])),
        logprobs=draw(st.none() | st.integers(0, 2)),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0, 2])),
        routing=draw(st.sampled_from([None, None, "top_k=1"])),
    )
    return Arrival(
        step=draw(st.just(0) | st.integers(0, 30)),
        prompt=[
            *text[first : first + num_shared],
            *(rng.randrange(1, VOCAB_SIZE) for _ in range(length - num_shared)),
        ],
        params=params,
        abort_after=draw(st.sampled_from([None, None, None, 0, 1, 2, 7])),
        salt=draw(st.sampled_from([None, None, "other"])),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[dict, list[Arrival]]:
    max_model_len = draw(st.integers(2, 40) | st.integers(25, 40))
    max_num_seqs = draw(st.integers(1, 5) | st.just(5))
    max_num_batched_tokens = draw(st.integers(max_num_seqs, 24))
    windows = draw(st.sampled_from([(None,), (None,), (None, 7), (9,), (1,), (8, None, 17)]))
    least = [PageGroup(window, 8, max_num_batched_tokens).most(max_model_len) for window in windows]
    pages = st.tuples(*(st.integers(count, count + 3) for count in least))
    options = {
        "max_model_len": max_model_len,
        "windows": windows,
        "num_pages": draw(st.lists(pages, min_size=1, max_size=3)),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_inflight": draw(st.integers(1, 2)),
    }
    arriving = draw(st.lists(arrivals(max_model_len), min_size=4, max_size=12))
    for index in range(1, len(arriving)):
        way = draw(st.sampled_from(["own", "own", "same prompt", "next turn"]))
        earlier = arriving[draw(st.integers(0, index - 1))]
        prompt = list(earlier.prompt)
        if way == "next turn":
            prompt += generate_alone(prompt, earlier.params, earlier.params.seed, max_model_len)[0]
            prompt = [*prompt, 7, 8][: max_model_len - 1]
        if way != "own":
            arriving[index] = replace(arriving[index], prompt=prompt)
    return options, arriving


class RandomTimes(StepTime):
    """Steps take random times, so that prompts run in chunks of any size, and at times not at all."""

    def __init__(self, seed: int) -> None:
        super().__init__(2.0)
        self._rng = random.Random(seed)

    def took(self, seconds: float) -> None:
        super().took(self._rng.choice([0.0, 0.1, 1.0, 9.0]))

    def prompt_budget(self, num_decode: int) -> int | None:
        budget = super().prompt_budget(num_decode)
        return budget and max(1, budget // self._rng.choice([1, 8, 16]))


def run(engine: Engine, arriving: list[Arrival]) -> dict[str, list[OutputDelta]]:
    deltas: dict[str, list[OutputDelta]] = {str(index): [] for index in range(len(arriving))}
    for now in range(5000):
        for index, arrival in enumerate(arriving):
            if arrival.step == now:
                user = str(index % 3)
                engine.add_request(str(index), arrival.prompt, arrival.params, user=user, cache_salt=arrival.salt)
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
    engine._scheduler.step_time = RandomTimes(len(arriving))
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
    event("prefixes found" if stats.prefix_cache.hits else "no prefixes found")
    event("pages copied" if any(rank.page_copies for plan in executor.plans for rank in plan.ranks) else "none copied")
    event("content forgotten" if stats.prefix_cache.evictions else "none forgotten")
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0), "pages have leaked"
    assert sum(stats.finished.values()) == len(arriving)
    # No request of a user starts before one of the same user and priority that arrived earlier (and was not aborted),
    # but for one that waits for pages of another's prompt.
    started: list[int] = []
    first_pages: dict[int, tuple[int, ...]] = {}
    for plan in executor.plans:
        new = {sequence.seq_id: sequence for rank in plan.ranks for sequence in rank.new_sequences}
        started += sorted(new.keys() - set(started))
        first_pages |= {seq_id: tuple(sequence.token_ids[:8]) for seq_id, sequence in new.items()}
    may_wait = [page for page, count in Counter(first_pages.values()).items() if count > 1]
    # Sequences get their numbers in order of arrival; within a step, in the order of the list.
    arrived = sorted(range(len(arriving)), key=lambda index: (arriving[index].step, index))
    groups = [(index % 3, arriving[index].params.priority) for index in arrived]
    for group in set(groups):
        own_way = [n for n in started if groups[n] == group and first_pages[n] not in may_wait]
        assert own_way == sorted(own_way)
