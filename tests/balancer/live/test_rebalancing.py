"""Experts move while real ranks serve: the tokens stay the same, and failed moves are undone."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import Pools, generate
from engines import pool_engine as engine_of_pool
from graph_ranks import ranks_in_torch
from kernel_marks import needs_native_kernels
from rebalancing_ranks import break_copies
from tiny_models import VOCAB, make_model, save

from moe_runtime.balancer.live.mover import Rebalance
from moe_runtime.balancer.placement import EMPTY, Placement
from moe_runtime.engine.engine import Engine
from moe_runtime.kernels.cpu.library import can_have_kernels
from moe_runtime.memory.initial_placement import slots_per_rank
from moe_runtime.types.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
pool_engine = partial(engine_of_pool, enable_prefix_caching=False)  # the same prompts run again after a move
# One token over and over uses the same experts all the time: three, which neither two nor four ranks can share evenly
# but with replicas.
HOT_PROMPTS = [[7] * 90] * 48


def finish(made: Engine, rebalance: Rebalance) -> None:
    for _ in range(1000):
        if rebalance.done:
            return
        made.tend()
    raise AssertionError("the migration does not end")


def check_slots(made: Engine) -> None:
    """Every rank has experts in slots of its own alone, with one empty in each layer, and memory for no more."""
    num_ranks = made.config.ep_size
    placement = made.placement()
    num_slots = slots_per_rank(made.config, made.model_config, num_ranks)
    assert placement.max_slots == max(num_slots)
    for rank, count in enumerate(num_slots):
        assert ((placement.slots[:, rank, :count] == EMPTY).sum(axis=1) >= 1).all()
        assert (placement.slots[:, rank, count:] == EMPTY).all()
    if not isinstance(made.config.redundant_experts, int):
        nbytes = [info.weight_bytes for info in made.executor.ranks]
        assert [(a > b) - (a < b) for a, b in pairwise(num_slots)] == [(a > b) - (a < b) for a, b in pairwise(nbytes)]


CAPACITY = {"capacity_factor": 0.5}


@pytest.mark.parametrize(
    ("dispatcher", "limits", "native"),
    [
        ("all_to_all", {}, True),
        ("all_gather", CAPACITY, True),
        ("symmetric", {}, True),
        ("symmetric", CAPACITY, True),
        ("all_to_all", CAPACITY, False),
        ("all_gather", {}, False),
    ],
)
def test_ranks_with_other_numbers_of_slots_with_every_dispatcher(
    rank_pool: Pools, tmp_path: Path, prompts: list[list[int]], dispatcher: str, limits: dict[str, float], native: bool
) -> None:
    if native and not can_have_kernels():
        pytest.skip("no native kernels here")
    path = save(make_model("glm4", num_experts_per_tok=3), tmp_path)
    with pool_engine(rank_pool, path, 1) as made:
        expected = generate(made, prompts, PARAMS)
    options = {"redundant_experts": [0, 2], "dispatcher": dispatcher, **limits}
    ranks = nullcontext() if native else ranks_in_torch(rank_pool(2), buckets=False)
    with ranks, pool_engine(rank_pool, path, 2, **options) as made:
        assert generate(made, prompts, PARAMS) == expected
        generate(made, HOT_PROMPTS, SamplingParams(max_tokens=1))
        rebalance = made.rebalance()
        finish(made, rebalance)
        assert rebalance.moves and not rebalance.rollbacks
        check_slots(made)
        assert generate(made, prompts, PARAMS) == expected
        assert set(made.stats().dispatcher_steps) == {dispatcher}


@pytest.fixture
def prompts() -> list[list[int]]:
    return [torch.randint(2, VOCAB, (length,)).tolist() for length in (5, 20, 33, 50, 8, 12)]


@pytest.mark.parametrize(
    ("case", "ep_size", "redundant", "dtype"),
    [
        pytest.param("qwen3", 2, 2, "bfloat16", marks=needs_native_kernels),
        ("glm4", 4, 1, "float32"),
        pytest.param("mixtral", 2, 0, "bfloat16", marks=needs_native_kernels),
        ("qwen3", 2, (0, 3), "float32"),
        pytest.param("glm4", 4, (4, 0, 1, 0), "bfloat16", marks=needs_native_kernels),
        pytest.param("deepseek3", 2, 2, "bfloat16", marks=needs_native_kernels),
        ("granite shared", 2, 1, "float32"),
    ],
)
def test_tokens_are_the_same_before_while_and_after_experts_move(
    rank_pool: Pools,
    tmp_path: Path,
    prompts: list[list[int]],
    case: str,
    ep_size: int,
    redundant: int | tuple[int, ...],
    dtype: str,
) -> None:
    path = save(make_model(case, num_experts_per_tok=3).bfloat16(), tmp_path)
    with pool_engine(rank_pool, path, 1, dtype=dtype) as made:
        expected = generate(made, prompts, PARAMS)
    options = {"redundant_experts": redundant, "migration_bytes_per_step": 2000, "dtype": dtype}
    with pool_engine(rank_pool, path, ep_size, **options) as made:
        assert generate(made, prompts, PARAMS) == expected
        generate(made, HOT_PROMPTS, SamplingParams(max_tokens=1))
        start = made.placement()
        started: list[Rebalance] = []
        found = generate(made, prompts, PARAMS, lambda step: step == 3 and started.append(made.rebalance()))
        assert found == expected
        finish(made, started[0])
        assert started[0].rollbacks == [] and made.placement().version > 0
        assert started[0].moves and len(started[0].moves) == started[0].planned_moves
        assert started[0].balancedness_after >= started[0].balancedness_before
        assert not np.array_equal(made.placement().hosts, start.hosts)
        if redundant:
            assert (made.placement().hosts.sum(axis=1) > 1).any(), "replicas"
        check_slots(made)
        assert generate(made, prompts, PARAMS) == expected
        load = made.expert_load()
        rows = (sum(map(len, prompts)) + 39 * len(prompts)) * made.model_config.moe.top_k
        assert (load.tokens["prefill"] + load.tokens["decode"]).sum(axis=1).min() >= 3 * rows


@pytest.mark.parametrize("fault", ["error", "corrupt"])
def test_a_copy_that_fails_changes_nothing_and_the_next_try_succeeds(
    rank_pool: Pools, tmp_path: Path, prompts: list[list[int]], fault: str
) -> None:
    path = save(make_model("qwen3"), tmp_path)
    with pool_engine(rank_pool, path, 2, redundant_experts=1, migration_bytes_per_step=2000) as made:
        expected = generate(made, prompts, PARAMS)
        pool = rank_pool(2)
        pool.run(break_copies, fault)
        failed: list[Rebalance] = []
        start = made.placement()
        assert generate(made, prompts, PARAMS, lambda step: step == 2 and failed.append(made.rebalance())) == expected
        finish(made, failed[0])
        assert failed[0].rollbacks and made.placement() == start and made.rebalancer.stats().rollbacks > 0
        pool.run(break_copies, None)
        again = made.rebalance()
        finish(made, again)
        assert again.rollbacks == [] and again.moves
        assert generate(made, prompts, PARAMS) == expected


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native_kernels), False])
def test_a_checkpoint_that_is_truncated_while_serving_costs_the_moves_alone(
    rank_pool: Pools, tmp_path: Path, prompts: list[list[int]], native: bool
) -> None:
    path = save(make_model("qwen3"), tmp_path)
    ranks = nullcontext() if native else ranks_in_torch(rank_pool(2), buckets=False)
    with ranks, pool_engine(rank_pool, path, 2, redundant_experts=1) as made:
        expected = generate(made, prompts, PARAMS)
        file, start = path / "model.safetensors", made.placement()
        os.truncate(file, file.stat().st_size // 2)
        rebalance = made.rebalance()
        finish(made, rebalance)
        assert rebalance.rollbacks and not rebalance.moves and made.placement() == start
        assert all("model.safetensors has changed since it was opened" in line for line in rebalance.rollbacks)
        assert generate(made, prompts, PARAMS) == expected


def test_dry_run_moves_nothing(rank_pool: Pools, tmp_path: Path, prompts: list[list[int]]) -> None:
    path = save(make_model("qwen3"), tmp_path)
    with pool_engine(rank_pool, path, 2) as made:
        generate(made, prompts, PARAMS)
        planned = made.rebalance(dry_run=True)
        assert planned.done and planned.planned_moves and made.placement().version == 0
        assert planned.balancedness_planned > planned.balancedness_before


def test_a_placement_file_is_the_start_and_must_fit(rank_pool: Pools, tmp_path: Path, prompts: list[list[int]]) -> None:
    path = save(make_model("qwen3"), tmp_path)
    with pool_engine(rank_pool, path, 1) as made:
        expected = generate(made, prompts, PARAMS)
        config = made.model_config
    slots = np.array([[[6, 5, 0, 1], [2, 0, 4, 3]]] * len(config.moe_layers))
    file = tmp_path / "placement.json"
    Placement(slots, 7, config.moe_layers).save(file)
    with pool_engine(rank_pool, path, 2, placement=str(file)) as made:
        assert np.array_equal(made.placement().slots[:, :, :4], slots)
        assert generate(made, prompts, PARAMS) == expected  # expert 0 has a replica from the start
    with pool_engine(rank_pool, path, 2, redundant_experts=[0, 2]) as made:
        generate(made, prompts, PARAMS)
        finish(made, made.rebalance())
        made.placement().save(tmp_path / "unequal.json")
        saved = made.placement()
    with pool_engine(rank_pool, path, 2, redundant_experts=[0, 2], placement=str(tmp_path / "unequal.json")) as made:
        assert made.placement() == saved
        assert generate(made, prompts, PARAMS) == expected
    with (
        pytest.raises(ValueError, match=r"is for ranks 2, but this run has 4"),
        pool_engine(rank_pool, path, 4, placement=str(file)),
    ):
        pass


def test_the_balancer_acts_by_itself_where_it_pays(rank_pool: Pools, tmp_path: Path, prompts: list[list[int]]) -> None:
    path = save(make_model("glm4"), tmp_path)
    with pool_engine(rank_pool, path, 1) as made:
        expected = generate(made, prompts, PARAMS)
    for policy in ("auto", "eplb"):
        with pool_engine(rank_pool, path, 2, balance=policy, balance_interval=10, redundant_experts=2) as made:
            for _ in range(6):
                assert generate(made, prompts, PARAMS) == expected
            if policy == "auto":
                reasons = {decision["reason"] for decision in made.rebalancer.decisions}
                assert reasons <= {
                    "pays back",
                    "new load",
                    "balanced",
                    "nothing to move",
                    "slower",
                    "does not pay back",
                }
                assert reasons
            else:
                assert made.placement().version > 0
