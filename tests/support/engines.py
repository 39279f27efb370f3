"""Engines whose ranks are those of a pool, and helpers to run requests on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rank_pool import PoolExecutor, RankPool

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.engine import Engine
from moe_runtime.kernels.cpu.library import can_have_kernels
from moe_runtime.types.outputs import OutputDelta
from moe_runtime.types.sampling_params import SamplingParams

Pools = Callable[[int], RankPool]

# How the same work can be run; the KV cache is in pages, see `in_bytes`.
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "one rank, chunks": (1, {"max_num_batched_tokens": 7, "max_num_seqs": 5}),
    "one rank, preempted": (1, {"block_size": 8, "kv_cache_memory_bytes": 13}),
    "two ranks, symmetric": (2, {"dispatcher": "symmetric"}),
    "two ranks, all_to_all": (2, {"dispatcher": "all_to_all"}),
    "two ranks, all_gather, chunks": (2, {"dispatcher": "all_gather", "max_num_batched_tokens": 9, "max_num_seqs": 3}),
    "two ranks, preempted": (2, {"block_size": 8, "kv_cache_memory_bytes": 13}),
}


def possible(ways: dict[str, tuple[int, dict[str, Any]]]) -> dict[str, tuple[int, dict[str, Any]]]:
    """The ways that this machine supports: sending rows through shared memory needs native kernels."""
    return {
        name: (ep_size, options)
        for name, (ep_size, options) in ways.items()
        if options.get("dispatcher") != "symmetric" or can_have_kernels()
    }


def in_bytes(options: dict[str, Any], model: Any) -> dict[str, Any]:
    """The options of a way, with the KV cache size converted from pages to bytes for this float32 model."""
    if "kv_cache_memory_bytes" not in options:
        return options
    c = model.config
    rank = getattr(c, "kv_lora_rank", None)
    kept = 2 * c.num_key_value_heads * c.head_dim if rank is None else rank + c.qk_rope_head_dim
    page = c.num_hidden_layers * options["block_size"] * kept * 4
    return options | {"kv_cache_memory_bytes": options["kv_cache_memory_bytes"] * page}


@contextmanager
def pool_engine(pools: Pools, path: Path, ep_size: int, **options: Any) -> Iterator[Engine]:
    """An engine on the CPU, with token ids as input and output."""
    config = EngineConfig(str(path), ep_size=ep_size, skip_tokenizer_init=True, device="cpu", **options)
    made = build_engine(config, lambda config, model, where: PoolExecutor(pools(ep_size), config, model, where))
    try:
        yield made
    finally:
        made.close()


def run(
    made: Engine,
    prompts: list[list[int]],
    params: SamplingParams | list[SamplingParams],
    before_step: Callable[[int], object] = lambda step: None,
) -> list[list[OutputDelta]]:
    """The deltas of each prompt, run together; `before_step` is called with the number of each step."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    for index, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
        made.add_request(str(index), prompt, p)
    found: list[list[OutputDelta]] = [[] for _ in prompts]
    step = 0
    while made.has_work:
        before_step(step)
        for delta in made.step():
            found[int(delta.request_id)].append(delta)
        step += 1
    return found


def tokens(deltas: list[OutputDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def logprobs(deltas: list[OutputDelta]) -> list[dict[int, float]]:
    """The requested log-probabilities of each position."""
    return [{t: e.logprob for t, e in position.items()} for delta in deltas for position in delta.logprobs or []]


def generate(
    made: Engine,
    prompts: list[list[int]],
    params: SamplingParams | list[SamplingParams],
    before_step: Callable[[int], object] = lambda step: None,
) -> list[list[int]]:
    """Output tokens of all prompts, run together."""
    return [tokens(deltas) for deltas in run(made, prompts, params, before_step)]
