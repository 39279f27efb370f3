"""Logits equal to transformers': every family and feature, 1, 2 and 4 ranks, whole prompts, chunks and decode rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_ranks import gather, plan_steps, run_steps
from rank_pool import RankPool
from tiny_models import CASES, VOCAB, make_model, save
from torch import Tensor

TORCH_WAYS = ("all_to_all", "all_gather")


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


@pytest.mark.parametrize(
    ("num_ranks", "native"),
    [(1, True), (2, True), (4, True), (1, False), (4, False)],
    ids=lambda value: {True: "native", False: "torch"}.get(value, value) if isinstance(value, bool) else str(value),
)
@pytest.mark.parametrize("case", CASES)
def test_float32_logits(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, case: str, num_ranks: int, native: bool
) -> None:
    model = make_model(case)
    save(model, tmp_path)
    lengths = [int(n) for n in torch.randint(3, 30, (4,))] + [70]
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in lengths]
    ranks = [0, 1 % num_ranks, 0, 2 % num_ranks, 0]  # with four ranks, one has no sequence
    ways = (*TORCH_WAYS, "symmetric") if native else TORCH_WAYS
    steps = plan_steps(prompts, ranks, num_ranks, [random_cuts(length) for length in lengths], ways)
    results = rank_pool(num_ranks).run(run_steps, tmp_path, "float32", steps, native)
    for ours, theirs in zip(gather(results, len(prompts)), reference(model, prompts), strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize(("case", "num_experts"), [("qwen3", 7), ("mixtral", 5), ("glm4", 12)])
def test_bfloat16_is_as_close_to_float32_as_transformers(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, case: str, num_experts: int, native: bool
) -> None:
    """Mean KL to float32, ours over theirs, of several models; within twice the standard error of that mean. All
    experts are used, since a choice that rounding flips moves the logits so far that a small sample says nothing."""
    ratios = []
    for attempt in range(8):
        model = make_model(case, num_experts_per_tok=num_experts)
        path = save(model.bfloat16(), tmp_path / str(attempt))
        prompts = [torch.randint(0, VOCAB, (80,)).tolist() for _ in range(12)]
        theirs = torch.cat(reference(model, prompts)).log_softmax(-1)
        exact = torch.cat(reference(model.float(), prompts)).log_softmax(-1)
        steps = plan_steps(prompts, [0, 1] * 6, 2, [[80]] * 12, TORCH_WAYS)
        results = rank_pool(2).run(run_steps, path, "bfloat16", steps, native)
        ours = torch.cat(gather(results, len(prompts))).log_softmax(-1)
        kl_ours, kl_theirs = ((exact.exp() * (exact - other)).sum(-1).mean().item() for other in (ours, theirs))
        assert kl_theirs > 0
        ratios.append(kl_ours / kl_theirs)
    standard_error = statistics.stdev(ratios) / len(ratios) ** 0.5
    assert statistics.mean(ratios) - 2 * standard_error <= 1.1, ratios
