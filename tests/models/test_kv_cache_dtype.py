"""A KV cache of 8 bits: the same promises as in the dtype of the activations, and logits that are near theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import WAYS, Pools, generate, pool_engine, possible
from kernel_marks import needs_native_kernels
from parity_ranks import gather, plan_steps, run_steps
from rank_pool import RankPool
from tiny_models import VOCAB, make_model, save
from torch import Tensor

from moe_runtime.memory.model_size import page_bytes
from moe_runtime.models.registry import read_model_config
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.messages import StepPlan

LENGTHS = [1, 3, 8, 17, 40, 70]
CASES = pytest.mark.parametrize(("case", "name"), [("gpt-oss", "int8"), ("deepseek3 odd sizes", "fp8")])


@needs_native_kernels
@CASES
def test_logits_do_not_depend_on_company_chunks_or_ranks(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, case: str, name: str
) -> None:
    save(make_model(case).bfloat16(), tmp_path)
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in LENGTHS]

    def logits(num_ranks: int, steps: list[StepPlan]) -> list[Tensor]:
        results = rank_pool(num_ranks).run(run_steps, tmp_path, "bfloat16", steps, True, False, name)
        return gather(results, len(prompts))

    expected = logits(1, plan_steps(prompts, [0] * len(prompts), 1, [[length] for length in LENGTHS]))
    assert all(torch.isfinite(rows).all() for rows in expected)
    cuts = {
        "chunks": [sorted({*torch.randint(1, length + 1, (3,)).tolist(), length}) for length in LENGTHS],
        "token by token": [list(range(1, length + 1)) for length in LENGTHS],
    }
    for num_ranks in (1, 2):
        ranks = torch.randint(num_ranks, (len(prompts),)).tolist()
        for way, ends in cuts.items():
            found = logits(num_ranks, plan_steps(prompts, ranks, num_ranks, ends))
            assert all(map(torch.equal, found, expected)), (num_ranks, way)


@CASES
def test_logits_are_near_those_of_a_cache_in_float32(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, case: str, name: str
) -> None:
    """Prompts in chunks: the earlier ones are read from the cache, and so are a chunk's own keys."""
    save(make_model(case), tmp_path)
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in LENGTHS]
    steps = plan_steps(prompts, [0] * len(prompts), 1, [sorted({length // 2 or 1, length}) for length in LENGTHS])

    def logprobs(native: bool, kv_cache_dtype: str) -> Tensor:
        found = rank_pool(1).run(run_steps, tmp_path, "float32", steps, native, False, kv_cache_dtype)
        return torch.cat(gather(found, len(prompts))).log_softmax(-1)

    def divergence(found: Tensor, expected: Tensor) -> float:
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    exact, quantized = logprobs(False, "auto"), logprobs(False, name)
    loss = divergence(quantized, exact)
    assert 0 < loss < (0.005 if name == "int8" else 0.4)
    if possible({"native": (1, {"dispatcher": "symmetric"})}):
        # A code may differ where a sum's last bit does.
        assert divergence(logprobs(True, name), quantized) < loss / 2


@needs_native_kernels
@pytest.mark.parametrize(("case", "name"), [("qwen2 windows", "fp8"), ("deepseek3", "int8")])
def test_greedy_tokens_are_the_same_in_all_ways(rank_pool: Pools, tmp_path: Path, case: str, name: str) -> None:
    """Preempted sequences, whose rows are written again, among them."""
    save(make_model(case), tmp_path)
    model = read_model_config(tmp_path)
    prompts = [torch.randint(2, VOCAB, (length,)).tolist() for length in (3, 17, 30, 45, 9, 60)]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    expected = None
    for way, (ep_size, options) in possible(WAYS).items():
        options = dict(options)
        if "preempted" in way:
            options["kv_cache_memory_bytes"] *= sum(page_bytes(model, 8, name))
        with pool_engine(rank_pool, tmp_path, ep_size, dtype="float32", kv_cache_dtype=name, **options) as made:
            found = generate(made, prompts, params)
            expected = expected or found
            assert found == expected, way
            assert (made.stats().num_preemptions > 0) == ("preempted" in way), way
            rank = made.executor.ranks[0]
            assert rank.kv_cache_dtype == name
            sizes = page_bytes(model, made.config.block_size, name)
            assert rank.kv_cache_bytes == sum(map(int.__mul__, rank.num_pages, sizes))
