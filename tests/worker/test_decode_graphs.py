"""Decode steps in buckets give the results of ordinary steps; on the CPU, a captured step is an ordinary call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import Pools, logprobs, pool_engine, run, tokens
from fake_cuda import FakeCuda
from graph_ranks import ranks_in_torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB, make_model, save

from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.engine import Engine
from moe_runtime.memory.graph_buckets import buckets_of
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.worker.decode_graphs import CudaCapture, capture_on, context_sizes


@contextmanager
def engine(pools: Pools, path: Path, ep_size: int, *, buckets: bool, **options: Any) -> Iterator[Engine]:
    options = {"dtype": "float32", "max_num_seqs": 5, "max_num_batched_tokens": 64, **options}
    with ranks_in_torch(pools(ep_size), buckets=buckets), pool_engine(pools, path, ep_size, **options) as made:
        yield made


def generate(
    made: Engine,
    prompts: list[list[int]],
    params: list[SamplingParams],
    before_step: Callable[[int], object] = lambda step: None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens, and log-probabilities of the chosen ones."""
    found = run(made, prompts, params, before_step)
    chosen = [list(zip(tokens(deltas), logprobs(deltas), strict=True)) for deltas in found]
    return [tokens(deltas) for deltas in found], [[entry[token] for token, entry in pairs] for pairs in chosen]


def work() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts whose answers end at different steps, so that buckets are full, half full, and empty on some ranks."""
    lengths, ends = [3, 17, 30, 45, 9, 60, 1], [30, 4, 25, 12, 28, 30, 1]
    prompts = [torch.randint(2, VOCAB, (length,)).tolist() for length in lengths]
    drawn = [{"temperature": 0.0}, {"temperature": 1.1, "top_k": 20}]
    params = [
        SamplingParams(seed=index, max_tokens=end, ignore_eos=True, logprobs=0, **drawn[index % 2])
        for index, end in enumerate(ends)
    ]
    return prompts, params


@pytest.mark.parametrize(
    ("case", "ep_size"), [("qwen3 window", 1), ("mixtral dynamic", 2), ("glm4 groups", 1), ("glm4 groups", 4)]
)
def test_buckets_give_the_tokens_of_ordinary_steps(rank_pool: Pools, tmp_path: Path, case: str, ep_size: int) -> None:
    save(make_model(case), tmp_path)
    prompts, params = work()
    with engine(rank_pool, tmp_path, ep_size, buckets=False) as made:
        tokens, logprobs = generate(made, prompts, params)
        assert "padded" not in made.stats().dispatcher_steps and made.executor.ranks[0].buckets == ()
    with engine(rank_pool, tmp_path, ep_size, buckets=True) as made:
        assert made.executor.ranks[0].buckets == (1, 2, 4, 5) and made.executor.ranks[0].graph_bytes > 0
        found_tokens, found_logprobs = generate(made, prompts, params)
        steps, load = made.stats().dispatcher_steps, made.expert_load()
        top_k = made.model_config.moe.top_k
    assert found_tokens == tokens and steps["padded"] >= 20
    for ours, theirs in zip(found_logprobs, logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    # Rows of padding are not counted; rows that overshoot a stop are, at most one for each request.
    least = (sum(map(len, tokens)) - len(prompts)) * top_k
    assert (load.tokens["prefill"].sum(axis=1) == sum(map(len, prompts)) * top_k).all()
    assert (load.tokens["decode"].sum(axis=1) >= least).all()
    assert (load.tokens["decode"].sum(axis=1) <= least + len(prompts) * top_k).all()


@pytest.mark.parametrize(("case", "name"), [("qwen3 window", "fp8"), ("deepseek3", "int8")])
def test_buckets_over_a_cache_of_8_bits(rank_pool: Pools, tmp_path: Path, case: str, name: str) -> None:
    """A code may differ where a sum's last bit does, so log-probabilities are near, up to a token that differs."""
    save(make_model(case), tmp_path)
    prompts, params = work()
    found = []
    for buckets in (False, True):
        with engine(rank_pool, tmp_path, 1, buckets=buckets, kv_cache_dtype=name) as made:
            found.append(generate(made, prompts, params))
            assert (made.stats().dispatcher_steps.get("padded", 0) >= 20) == buckets
    (tokens, logprobs), (found_tokens, found_logprobs) = found
    num_same = 0
    for index, pair in enumerate(zip(tokens, found_tokens, strict=True)):
        same = next((i for i, (ours, theirs) in enumerate(zip(*pair, strict=True)) if ours != theirs), len(pair[0]))
        assert found_logprobs[index][:same] == pytest.approx(logprobs[index][:same], abs=0.05)
        num_same += same
    assert num_same >= sum(map(len, tokens)) / 2


@pytest.mark.parametrize("redundant", [2, (0, 3)])
def test_experts_may_move_and_multiply_under_buckets(rank_pool: Pools, tmp_path: Path, redundant: object) -> None:
    save(make_model("qwen3"), tmp_path)
    prompts, params = work()
    with engine(rank_pool, tmp_path, 2, buckets=False) as made:
        expected, _ = generate(made, prompts, params)
    options = {"redundant_experts": redundant, "migration_bytes_per_step": 20_000}
    with engine(rank_pool, tmp_path, 2, buckets=True, **options) as made:
        before = made.placement()
        assert generate(made, prompts, params, lambda step: step == 8 and made.rebalance())[0] == expected
        while made.is_migrating:
            made.tend()
        assert generate(made, prompts, params)[0] == expected
        after = made.placement()
        assert not np.array_equal(before.slots, after.slots) and made.stats().dispatcher_steps["padded"] > 20


def test_requests_that_ask_more_of_gates_run_ordinary_steps(rank_pool: Pools, tmp_path: Path) -> None:
    save(make_model("qwen3"), tmp_path)
    prompts, params = work()
    with engine(rank_pool, tmp_path, 2, buckets=True) as made:
        for asked in ({"routing": "top_k=2"}, {"return_routed_experts": True}):
            made.add_request("x", prompts[0], SamplingParams(max_tokens=6, ignore_eos=True, **asked))
            while made.has_work:
                made.step()
        assert "padded" not in made.stats().dispatcher_steps
        generate(made, prompts, params)
        assert made.stats().dispatcher_steps["padded"] > 0


@given(st.integers(1, 300), st.integers(1, 8))
def test_buckets_are_powers_of_two_up_to_the_most(max_num_seqs: int, num_ranks: int) -> None:
    config = EngineConfig("m", max_num_seqs=max_num_seqs)
    buckets = buckets_of(config, num_ranks)
    assert list(buckets) == sorted(set(buckets)) and buckets[-1] == (
        max_num_seqs if num_ranks == 1 else min(64, max_num_seqs)
    )
    assert all(bucket & (bucket - 1) == 0 for bucket in buckets[:-1])
    assert all(after <= 2 * before for before, after in pairwise(buckets))


@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"record_trace": "t.npz"}, {"dispatcher": "all_to_all"}])
def test_options_that_leave_no_buckets(options: dict[str, Any]) -> None:
    assert buckets_of(EngineConfig("m", **options), 2) == ()


def test_contexts() -> None:
    assert context_sizes(100) == (100,) and context_sizes(4096) == (4096,)
    assert context_sizes(4097) == (4096, 4097) and context_sizes(131072) == (4096, 16384, 65536, 131072)


def test_cpus_capture_nothing() -> None:
    assert capture_on(torch.device("cpu")) is None


def test_a_capture_warms_up_beside_the_main_stream_and_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    capture = CudaCapture(torch.device("cuda", 0))
    replay = capture(lambda: cuda.note("step"))
    warm_up = ["side waits for main", "step on side", "step on side", "main waits for side"]
    assert cuda.log == [*warm_up, "capture begins", "step on main", "capture ends"]
    del cuda.log[:]
    replay()
    assert cuda.log == ["replay on main"]
