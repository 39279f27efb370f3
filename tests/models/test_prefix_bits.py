"""With native kernels, a request has the same bits with its prefix from the cache as without; with torch, the same
greedy tokens."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Pools, logprobs, pool_engine, run, tokens
from kernel_marks import needs_native_kernels
from tiny_models import VOCAB, make_model, save

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.engine import Engine
from moe_runtime.engine.stats import PrefixCounts
from moe_runtime.memory.model_size import page_bytes
from moe_runtime.models.registry import read_model_config
from moe_runtime.types.outputs import OutputDelta
from moe_runtime.types.sampling_params import SamplingParams

BLOCK = 8
CASES = [
    ("qwen3 bias, tied", "bfloat16", "auto"),
    ("gpt-oss", "bfloat16", "auto"),
    ("qwen2 windows", "bfloat16", "int8"),
    ("deepseek3 odd sizes", "bfloat16", "auto"),
    ("deepseek3", "bfloat16", "fp8"),
    ("mixtral dynamic", "float32", "auto"),
]
# Pages for two of the sequences below, so that they are preempted and content is forgotten.
FEW_PAGES = 16


def rounds() -> list[list[list[int]]]:
    """Prompts of three rounds: the same beginnings within a round, those of earlier rounds, and whole prompts again."""

    def some(length: int) -> list[int]:
        return torch.randint(2, VOCAB, (length,)).tolist()

    system, other = some(37), some(16)
    first = [system + some(5), system + some(12), other + some(20), some(9)]
    second = [first[0], first[0], system + some(3), first[2], first[3]]
    return [first, second, [second[0] + some(8), first[1], first[1], some(30)]]


def serve(engine: Engine, is_exact: bool) -> list[list[OutputDelta]]:
    """The deltas of all rounds. The last round has the next turns of the first round's requests as well."""
    asked: list[dict[str, Any]] = [{}, {}, {"temperature": 0.9}, {"routing": "top_k=1"}, {"temperature": 1.0}]
    alike: dict[str, Any] = {"temperature": 0.0, "max_tokens": 11, "ignore_eos": True, "logprobs": 2}
    seeded = [SamplingParams(**(alike | {"seed": seed} | each)) for seed, each in enumerate(asked)]
    if not is_exact:
        seeded = [SamplingParams(**alike)] * 5
    found: list[list[OutputDelta]] = []
    turns: list[list[int]] = []
    for prompts in rounds():
        found += run(engine, prompts, seeded[: len(prompts)])
        turns = turns or [p + tokens(deltas) + [3, 4] for p, deltas in zip(prompts, found, strict=True)]
    return found + run(engine, turns, seeded[: len(turns)])


def options(way: str, path: Path, kv_cache_dtype: str) -> dict[str, Any]:
    if way == "chunks":
        return {"max_num_batched_tokens": 9, "max_num_seqs": 4}
    if way == "preempted":
        page = sum(
            page_bytes(read_model_config(path), BLOCK, "float32" if kv_cache_dtype == "auto" else kv_cache_dtype)
        )
        return {"kv_cache_memory_bytes": FEW_PAGES * page, "max_num_seqs": 5, "max_num_batched_tokens": 40}
    return {}


Deltas = list[list[OutputDelta]]


def both(pools: Pools | None, path: Path, ep_size: int, **chosen: Any) -> tuple[Deltas, Deltas, PrefixCounts]:
    """The deltas without and with the cache, and its counts. Without pools, the rank runs in this process."""
    found = []
    chosen |= {"block_size": BLOCK, "max_model_len": 96}
    for enabled in (False, True):
        torch.manual_seed(0)
        with ExitStack() as stack:
            if pools is None:
                engine = build_engine(EngineConfig(str(path), device="cpu", enable_prefix_caching=enabled, **chosen))
                stack.callback(engine.close)
            else:
                engine = stack.enter_context(pool_engine(pools, path, ep_size, enable_prefix_caching=enabled, **chosen))
            found.append(serve(engine, is_exact=pools is not None))
            stats = engine.stats()
            assert {counts.used for counts in stats.page_counts} == {0}, "pages have leaked"
    return found[0], found[1], stats.prefix_cache


@needs_native_kernels
@pytest.mark.parametrize(("case", "dtype", "kv_cache_dtype"), CASES)
def test_a_hit_has_the_same_bits_as_none(
    rank_pool: Pools, tmp_path: Path, case: str, dtype: str, kv_cache_dtype: str
) -> None:
    save(make_model(case).bfloat16(), tmp_path)
    ways = [(1, "whole"), (1, "preempted"), (2, "chunks")]
    for ep_size, way in ways:
        chosen = options(way, tmp_path, kv_cache_dtype) | {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype}
        without, found, counts = both(rank_pool, tmp_path, ep_size, **chosen)
        for index, (ours, theirs) in enumerate(zip(found, without, strict=True)):
            assert tokens(ours) == tokens(theirs), (way, index)
            assert logprobs(ours) == logprobs(theirs), (way, index)
        assert counts.hits > 100, way
        cached = [deltas[0].num_cached_tokens for deltas in found]
        assert cached[0] == 0
        assert way != "whole" or any(number % BLOCK for number in cached), "pages are copied"


@pytest.mark.parametrize("case", ["gpt-oss", "deepseek3"])
def test_torch_has_the_same_greedy_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr("moe_runtime.worker.rank_setup.load_or_none", lambda: None)
    save(make_model(case), tmp_path)
    without, found, counts = both(None, tmp_path, 1, dtype="float32", skip_tokenizer_init=True)
    assert list(map(tokens, found)) == list(map(tokens, without))
    assert counts.hits > 100


@needs_native_kernels
def test_hits_outlive_a_move_of_experts(rank_pool: Pools, tmp_path: Path) -> None:
    save(make_model("qwen3").bfloat16(), tmp_path)
    first = torch.randint(2, VOCAB, (50,)).tolist()
    second = [*first[:45], *torch.randint(2, VOCAB, (10,)).tolist()]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=2)
    found = []
    for enabled in (False, True):
        with pool_engine(rank_pool, tmp_path, 2, redundant_experts=1, enable_prefix_caching=enabled) as engine:
            run(engine, [first], params)
            rebalance = engine.rebalance()
            for _ in range(1000):
                engine.tend()
            assert rebalance.done and rebalance.moves and not rebalance.rollbacks
            (deltas,) = run(engine, [second], params)
            assert deltas[0].num_cached_tokens == (32 if enabled else 0)
            found.append((tokens(deltas), logprobs(deltas)))
    assert found[0] == found[1]
