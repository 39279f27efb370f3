"""Logits equal to transformers': every family and feature, 1, 2 and 4 ranks, whole prompts, chunks and decode rows."""

from __future__ import annotations

import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Pools
from kernel_marks import needs_native_kernels
from parity_ranks import gather, plan_steps, run_steps
from tiny_models import CASES, FIRST_CASES, VOCAB, all_experts, load, make_model, save
from torch import Tensor

from moe_runtime.kernels.cpu.library import can_have_kernels

TORCH_WAYS = ("all_to_all", "all_gather")
MOST_KL = 1.1  # of transformers' own; docs/architecture.md


def reference(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts]


def random_cuts(length: int) -> list[int]:
    """Some prompts whole, some in chunks, some with single tokens at the end."""
    style = int(torch.randint(3, ()))
    if style == 0:
        return [length]
    if style == 1:
        return sorted({int(cut) for cut in torch.randint(1, length, (2,))} | {length})
    return [length - 2, length - 1, length]


@dataclass(frozen=True)
class Example:
    """A model, prompts, and transformers' logits of them."""

    path: Path
    prompts: list[list[int]]
    logits: list[Tensor]


@pytest.fixture(scope="module", params=CASES)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    model = make_model(request.param)
    lengths = [int(n) for n in torch.randint(3, 30, (4,))] + [70]
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in lengths]
    return Example(save(model, tmp_path_factory.mktemp("model")), prompts, reference(model, prompts))


@pytest.mark.parametrize(
    ("num_ranks", "native"),
    [
        pytest.param(num_ranks, native, marks=needs_native_kernels if native else (), id=f"{num_ranks}-{kind}")
        for num_ranks, native, kind in (
            (1, True, "native"),
            (4, True, "native"),
            (1, False, "torch"),
            (2, False, "torch"),
        )
    ],
)
def test_float32_logits(rank_pool: Pools, example: Example, num_ranks: int, native: bool) -> None:
    prompts = example.prompts
    ranks = [0, 1 % num_ranks, 0, 2 % num_ranks, 0]  # with four ranks, one has no sequence
    ways = (*TORCH_WAYS, "symmetric") if native else TORCH_WAYS
    steps = plan_steps(prompts, ranks, num_ranks, [random_cuts(len(prompt)) for prompt in prompts], ways)
    results = rank_pool(num_ranks).run(run_steps, example.path, "float32", steps, native)
    for ours, theirs in zip(gather(results, len(prompts)), example.logits, strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def bounds(ratios: list[float]) -> tuple[float, float]:
    """Three standard errors below and above the mean; wide enough that looking after every model does no harm."""
    if len(ratios) < 6:
        return -math.inf, math.inf
    margin = 3 * statistics.stdev(ratios) / len(ratios) ** 0.5
    return statistics.mean(ratios) - margin, statistics.mean(ratios) + margin


@pytest.mark.parametrize("case", FIRST_CASES)
def test_bfloat16_is_as_close_to_float32_as_transformers(rank_pool: Pools, tmp_path: Path, case: str) -> None:
    """Mean KL to float32, ours over theirs: of so many models that it is surely at most 1.1, or surely more. All
    experts are used, since a choice that rounding flips moves the logits so far that a small sample says nothing."""
    ratios: dict[bool, list[float]] = {native: [] for native in ((True, False) if can_have_kernels() else (False,))}
    for attempt in range(80):
        open_ways = [native for native, found in ratios.items() if bounds(found)[0] <= MOST_KL < bounds(found)[1]]
        if not open_ways:
            break
        path = save(make_model(case, **all_experts(case)).bfloat16(), tmp_path / str(attempt))
        prompts = [torch.randint(0, VOCAB, (80,)).tolist() for _ in range(8)]
        theirs, exact = (
            torch.cat(reference(load(path, dtype), prompts)).log_softmax(-1)
            for dtype in (torch.bfloat16, torch.float32)
        )
        num_ranks = 2 if attempt == 0 else 1  # an expert's row is rounded once, whichever rank computes it
        steps = plan_steps(prompts, [0, num_ranks - 1] * 4, num_ranks, [[80]] * 8, TORCH_WAYS)
        for native in open_ways:
            results = rank_pool(num_ranks).run(run_steps, path, "bfloat16", steps, native)
            ours = torch.cat(gather(results, len(prompts))).log_softmax(-1)
            kl_ours, kl_theirs = ((exact.exp() * (exact - other)).sum(-1).mean().item() for other in (ours, theirs))
            assert kl_theirs > 0
            ratios[native].append(kl_ours / kl_theirs)
        shutil.rmtree(path)
    for native, found in ratios.items():
        assert bounds(found)[1] <= MOST_KL, ("native" if native else "torch", statistics.mean(found), found)
