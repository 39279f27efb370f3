"""Capacity and load-aware experts through the engine: exact results stay exact, changed experts are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import Pools, logprobs, pool_engine, possible, run, tokens
from tiny_models import VOCAB, make_model, save

from moe_runtime import LLM
from moe_runtime.balancer.trace import UNUSED, RoutingTrace
from moe_runtime.engine.engine import Engine
from moe_runtime.types.expert_policy import ExpertPolicy
from moe_runtime.types.outputs import ExpertChanges, OutputDelta
from moe_runtime.types.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=2, return_routed_experts=True)
CASES = ("qwen3 normalised", "glm4 groups")


def skewed_model(case: str) -> Any:
    """Its gates agree with each other: some experts are hot."""
    model = make_model(case)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gate.weight") and "experts" not in name:
                weight.mul_(torch.linspace(1.5, 0.3, len(weight))[:, None])
    return model


def draw_prompts() -> list[list[int]]:
    return [torch.randint(2, VOCAB, (length,)).tolist() for length in (3, 17, 30, 45, 9, 50)]


def experts(deltas: list[OutputDelta]) -> np.ndarray:
    found = deltas[-1].routed_experts
    assert found is not None
    return found


def is_bitwise(made: Engine) -> bool:
    return made.health()["placement_invariance"] == "bitwise"


WAYS = {
    "one rank": (1, {}),
    "one rank, chunks": (1, {"max_num_batched_tokens": 9, "max_num_seqs": 5}),
    "two ranks, symmetric": (2, {"dispatcher": "symmetric"}),
    "two ranks, all_to_all": (2, {"dispatcher": "all_to_all"}),
    "two ranks, all_gather, chunks": (2, {"dispatcher": "all_gather", "max_num_batched_tokens": 9, "max_num_seqs": 3}),
    "four ranks": (4, {}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_queue_changes_no_bit(rank_pool: Pools, tmp_path: Path, case: str, dtype: str) -> None:
    save(skewed_model(case).to(getattr(torch, dtype)), tmp_path)
    prompts = draw_prompts()
    with pool_engine(rank_pool, tmp_path, 1, dtype=dtype) as made:
        expected = run(made, prompts, PARAMS)
        native = is_bitwise(made)
        load = made.expert_load().tokens
    if not native and dtype == "bfloat16":
        pytest.skip("torch promises tokens in float32 only")
    for name, (ep_size, options) in possible(WAYS).items():
        factor = float(torch.empty(()).uniform_(0.2, 0.9))
        with pool_engine(rank_pool, tmp_path, ep_size, dtype=dtype, capacity_factor=factor, **options) as made:
            found = run(made, prompts, PARAMS)
            assert [tokens(deltas) for deltas in found] == [tokens(deltas) for deltas in expected], name
            for ours, theirs in zip(found, expected, strict=True):
                assert np.array_equal(experts(ours), experts(theirs)), name
                assert ours[-1].expert_changes is None
                assert not native or logprobs(ours) == logprobs(theirs), name
            assert made.stats().extra_rounds > 0, name
            assert is_bitwise(made) == native
            assert np.array_equal(made.expert_load().tokens["prefill"], load["prefill"]), name


@pytest.mark.parametrize("case", CASES)
def test_a_queue_of_replicas_changes_no_bit(rank_pool: Pools, tmp_path: Path, case: str) -> None:
    save(skewed_model(case), tmp_path)
    prompts = draw_prompts()
    options: dict[str, Any] = {"dtype": "float32", "redundant_experts": 2, "dispatcher": "all_to_all"}
    found = []
    for limits in ({}, {"capacity_factor": 0.4}):
        with pool_engine(rank_pool, tmp_path, 2, **options, **limits) as made:
            run(made, prompts, PARAMS)
            rebalance = made.rebalance()
            while not rebalance.done:
                made.tend()
            assert rebalance.planned_moves > 0
            found.append(run(made, prompts, PARAMS))
            native = is_bitwise(made)
    for ours, theirs in zip(*found, strict=True):
        assert tokens(ours) == tokens(theirs)
        assert not native or logprobs(ours) == logprobs(theirs)


LIMITS = {
    "reroute": {"capacity_factor": 1.0, "overflow": "reroute"},
    "drop": {"capacity_factor": 1.0, "overflow": "drop"},
    "moved": {"balance_epsilon": 0.8},
    "all": {"capacity_factor": 0.9, "overflow": "reroute", "balance_epsilon": 0.8},
    "moved and queued": {"capacity_factor": 0.5, "balance_epsilon": 0.8},
}


@pytest.mark.parametrize("name", list(LIMITS))
@pytest.mark.parametrize("case", CASES)
def test_what_changes_is_counted_and_shown(rank_pool: Pools, tmp_path: Path, case: str, name: str) -> None:
    save(skewed_model(case), tmp_path)
    prompts = draw_prompts()
    trace = tmp_path / "routing.npz"
    limits = {**LIMITS[name], "record_trace": str(trace)}
    with pool_engine(rank_pool, tmp_path, 2, dtype="float32", **limits) as made:
        found = run(made, prompts, PARAMS)
        stats, load, config = made.stats(), made.expert_load(), made.model_config
        assert made.health()["placement_invariance"] == "none"
    changes = [deltas[-1].expert_changes for deltas in found]
    assert all(each is not None for each in changes)
    total = sum(changes, ExpertChanges())
    # rows that overshot an end are in the engine's counts alone
    assert total.moved <= stats.expert_changes.moved and total.dropped <= stats.expert_changes.dropped
    assert (total.moved > 0) == ("balance_epsilon" in limits)
    assert (total.rerouted > 0) == (limits.get("overflow") == "reroute")
    assert (total.dropped > 0) or name not in ("drop", "all")
    assert (stats.extra_rounds > 0) == (name == "moved and queued")
    for prompt, deltas, each in zip(prompts, found, changes, strict=True):
        used = experts(deltas)
        assert used.shape[0] == len(prompt) + 9 and (used == 0xFF).sum() == each.dropped
        for row in used.reshape(-1, config.moe.top_k).tolist():
            kept = [e for e in row if e != 0xFF]
            assert len(set(kept)) == len(kept)
    saved = RoutingTrace.load(trace)
    assert np.array_equal(saved.counts(), np.stack([load.tokens["prefill"], load.tokens["decode"]]))
    assert (saved.experts == UNUSED).sum() == stats.expert_changes.dropped


@pytest.mark.parametrize("overflow", ["reroute", "drop"])
def test_no_expert_gets_more_than_its_capacity(tmp_path: Path, overflow: str) -> None:
    save(skewed_model("qwen3"), tmp_path)
    prompt = torch.randint(2, VOCAB, (64,)).tolist()
    params = replace(PARAMS, max_tokens=1)
    with LLM(tmp_path, skip_tokenizer_init=True, device="cpu", capacity_factor=1.2, overflow=overflow) as llm:
        (out,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        load = llm.expert_load()
    room = int(np.ceil(1.2 * 64 * 3 / 7))
    assert load.tokens["prefill"].max() == room
    found = out.outputs[0]
    assert found.expert_changes is not None and found.routed_experts is not None
    changed = found.expert_changes.rerouted if overflow == "reroute" else found.expert_changes.dropped
    assert changed > 0
    assert load.tokens["prefill"].sum() == 64 * 3 * 3 - found.expert_changes.dropped


def test_policies_and_limits_go_together(tmp_path: Path) -> None:
    save(skewed_model("qwen3"), tmp_path)
    prompts = [{"prompt_token_ids": prompt} for prompt in draw_prompts()]
    params = replace(PARAMS, routing=ExpertPolicy(top_k=2))
    with LLM(tmp_path, skip_tokenizer_init=True, device="cpu", capacity_factor=0.7, overflow="reroute") as llm:
        outs = llm.generate(prompts, params, use_tqdm=False)
    for out in outs:
        found = out.outputs[0]
        assert found.routed_experts is not None and found.expert_changes is not None
        unused = (found.routed_experts == 0xFF).sum()
        assert unused == found.routed_experts[..., 0].size + found.expert_changes.dropped


def test_moving_lightens_the_heaviest_rank(rank_pool: Pools, tmp_path: Path) -> None:
    model = make_model("glm4")
    for name, bias_E in model.named_buffers():
        if name.endswith("correction_bias"):
            bias_E[: len(bias_E) // 2] += 1.0  # the experts of rank 0
    save(model, tmp_path)
    prompts = [torch.randint(2, VOCAB, (60,)).tolist() for _ in range(12)]
    balancedness = []
    for limits in ({}, {"balance_epsilon": 0.9}):
        with pool_engine(rank_pool, tmp_path, 2, dtype="float32", max_num_batched_tokens=64, **limits) as made:
            run(made, prompts, replace(PARAMS, max_tokens=1))
            balancedness.append(made.expert_load().balancedness("prefill").mean())
    assert balancedness[0] < 0.7
    assert balancedness[1] > balancedness[0] + 0.05
