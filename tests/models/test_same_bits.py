"""A token's logits have the same bits in any batch, in any chunks, on any number of ranks: with native kernels, and
with torch if `batch_invariant` is set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_marks import needs_native_kernels
from parity_ranks import gather, plan_steps, run_steps
from rank_pool import RankPool
from tiny_models import FIRST_CASES, VOCAB, make_model, save
from torch import Tensor

from moe_runtime.wire.messages import StepPlan

CASES = ["qwen3 bias, tied", "qwen3 window", "mixtral dynamic", "glm4 groups", "glm4 partial yarn"]
CASES += [case for case in FIRST_CASES if case not in ("qwen3", "mixtral", "glm4")]
CASES += ["qwen2 windows", "deepseek3 odd sizes"]
# Token by token, as many sequences run together as are this long or longer. The kernels are the same for all families,
# so one case has every number of rows from 34 to 1, and the others have some.
ALL_LENGTHS = [*range(1, 34), 70]
SOME_LENGTHS = [1, 2, 3, 5, 7, 8, 13, 16, 17, 33, 70]


def in_chunks(length: int) -> list[int]:
    return sorted({int(cut) for cut in torch.randint(1, length + 1, (3,))} | {length})


def token_by_token(length: int) -> list[int]:
    return list(range(1, min(length, 33) + 1)) + [length] * (length > 33)


CUTS: dict[str, Callable[[int], list[int]]] = {
    "whole": lambda length: [length],
    "chunks": in_chunks,
    "token by token": token_by_token,
}


@needs_native_kernels
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "bfloat16") for case in CASES), ("qwen3 window", "float32"), ("glm4 partial yarn", "float32")],
)
def test_logits_do_not_depend_on_company_chunks_ranks_or_dispatcher(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, case: str, dtype: str
) -> None:
    model = make_model(case)
    save(model.bfloat16(), tmp_path)
    lengths = ALL_LENGTHS if case == "qwen3 window" else SOME_LENGTHS
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in lengths]

    def logits(num_ranks: int, steps: list[StepPlan]) -> list[Tensor]:
        return gather(rank_pool(num_ranks).run(run_steps, tmp_path, dtype, steps, True), len(prompts))

    count = range(len(prompts))
    alone = [
        plan_steps(prompts, [0 for _ in count], 1, [[lengths[i]] if i == own else [] for i in count]) for own in count
    ]
    expected = logits(1, [step for steps in alone for step in steps])
    assert all(torch.isfinite(rows).all() for rows in expected)
    for num_ranks in (1, 2, 4):
        ranks = [int(rank) for rank in torch.randint(num_ranks, (len(prompts),))]
        for name, cut in CUTS.items():
            cuts = [cut(length) for length in lengths]
            ways = ["local"] if num_ranks == 1 else ["symmetric", "all_gather", "all_to_all"]
            # With two ranks, prompts run whole in all ways in turn; with four, in each way alone.
            for way in ways if name == "whole" and num_ranks != 2 else [tuple(ways)]:
                steps = plan_steps(prompts, ranks, num_ranks, cuts, (way,) if isinstance(way, str) else way)
                for length, ours, theirs in zip(lengths, logits(num_ranks, steps), expected, strict=True):
                    assert torch.equal(ours, theirs), (num_ranks, name, way, length)


@pytest.mark.parametrize(
    ("case", "dtype"), [("qwen3 window", "bfloat16"), ("glm4 groups", "float32"), ("deepseek3", "float32")]
)
def test_batch_invariant_torch(rank_pool: Callable[[int], RankPool], tmp_path: Path, case: str, dtype: str) -> None:
    """The forms that compute each row by itself, on CPUs; what the option chooses on GPUs has the same signatures."""
    save(make_model(case).bfloat16(), tmp_path)
    lengths = [1, 2, 5, 9, 19, 24]
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in lengths]

    def logits(num_ranks: int, steps: list[StepPlan], batch_invariant: bool) -> list[Tensor]:
        results = rank_pool(num_ranks).run(run_steps, tmp_path, dtype, steps, False, batch_invariant)
        return gather(results, len(prompts))

    own = [plan_steps([p], [0], 1, [[len(p)]])[0] for p in prompts]
    expected = [gather(rank_pool(1).run(run_steps, tmp_path, dtype, [step], False, True), 1)[0] for step in own]
    usual_differs = False
    for num_ranks in (1, 2, 4):
        ranks = [int(rank) for rank in torch.randint(num_ranks, (len(prompts),))]
        for name, cut in CUTS.items():
            steps = plan_steps(prompts, ranks, num_ranks, [cut(n) for n in lengths], ("all_gather", "all_to_all"))
            for length, ours, theirs in zip(lengths, logits(num_ranks, steps, True), expected, strict=True):
                assert torch.equal(ours, theirs), (num_ranks, name, length)
            usual_differs |= not all(map(torch.equal, logits(num_ranks, steps, False), expected))
    assert usual_differs, "or the option would do nothing here"
