"""The choices that are evaluated, and the one that is recommended."""

from __future__ import annotations

from dataclasses import replace

import pytest
from places import ROOT
from planner_shapes import IDEAL, tiny

from moe_runtime.planner.choices import evaluate, recommend
from moe_runtime.planner.hardware_file import load_hardware
from moe_runtime.planner.routing import LoadRouting
from moe_runtime.planner.shape import ModelShape

DEEPSEEK = ModelShape.load(ROOT / "benchmarks" / "planner" / "deepseek-v3.json")


def test_memory_of_a_rank_falls_with_ranks_and_grows_with_replicas():
    routing = LoadRouting.assume("zipf:1.0", DEEPSEEK.num_experts, DEEPSEEK.top_k)
    found = list(
        evaluate(
            DEEPSEEK,
            load_hardware("h800"),
            routing,
            ranks=[8, 16, 32, 64],
            redundant=[0, 1],
            batches=[8],
            phase="decode",
            length=1000,
        )
    )
    memory = {(choice.ranks, choice.redundant): choice.prediction.rank_memory.total for choice in found}
    for ranks in (8, 16, 32, 64):
        assert memory[ranks, 1] - memory[ranks, 0] == DEEPSEEK.num_sparse_layers * sum(
            m.parameters for m in DEEPSEEK.expert
        )
    assert memory[8, 0] > memory[16, 0] > memory[32, 0] > memory[64, 0]
    assert not found[0].prediction.fits and found[-1].prediction.fits
    balance = {(choice.ranks, choice.redundant): choice.prediction.balancedness for choice in found}
    assert all(balance[ranks, 1] > balance[ranks, 0] for ranks in (16, 32, 64))


def test_more_ranks_than_experts():
    routing = LoadRouting.assume("uniform", 4, 1)
    found = list(evaluate(tiny(), IDEAL, routing, ranks=[6], redundant=[0, 4], batches=[3], phase="decode", length=5))
    assert [choice.redundant for choice in found] == [0, 3]  # no rank has more slots than there are experts


def test_the_recommendation_fits_is_fast_enough_and_is_not_dearer_than_it_must_be():
    shape, routing = tiny(num_experts=12, top_k=3), LoadRouting.assume("zipf:1.5", 12, 3)
    hardware = replace(load_hardware("h200"), memory_bytes=4.1e9)
    choices = list(
        evaluate(
            shape, hardware, routing, ranks=[1, 2, 4], redundant=[0, 1], batches=[1, 64], phase="decode", length=900
        )
    )
    assert sum(choice.ranks == 1 for choice in choices) == 2  # one rank has nothing to replicate
    best = recommend(choices)
    assert best is not None and best.prediction.fits
    rates = [choice.tokens_per_second_rank for choice in choices if choice.prediction.fits]
    assert best.tokens_per_second_rank >= 0.99 * max(rates)
    limit = min(choice.prediction.step_seconds for choice in choices)
    quick = recommend(choices, limit)
    assert quick is not None and quick.prediction.step_seconds <= limit
    assert recommend(choices, limit / 2) is None
    assert (
        recommend(
            list(
                evaluate(
                    shape,
                    replace(hardware, memory_bytes=1.0),
                    routing,
                    ranks=[2],
                    redundant=[0],
                    batches=[1],
                    phase="decode",
                    length=9,
                )
            )
        )
        is None
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": [0]}, "ranks: 0 is not allowed; it must be from 1 to 4096"),
        ({"ranks": [5000]}, "ranks: 5000 is not allowed"),
        ({"redundant": [-1]}, "redundant: -1 is not allowed; it must be from 0 to 4"),
        ({"batches": [0]}, "batch: 0 is not allowed"),
        ({"length": 0}, "length: 0 is not allowed"),
        ({"phase": "train"}, "phase: 'train' is not allowed"),
    ],
)
def test_what_cannot_be_evaluated(changes, message):
    asked = {"ranks": [2], "redundant": [0], "batches": [1], "phase": "decode", "length": 5} | changes
    with pytest.raises(ValueError, match=message):
        list(evaluate(tiny(), IDEAL, LoadRouting.assume("uniform", 4, 1), **asked))
