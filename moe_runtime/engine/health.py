"""What `/health` reports: the engine's choices and guarantees. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.engine.prefix_cache import why_off
from moe_runtime.engine.stats import EngineStats
from moe_runtime.types.version import __version__
from moe_runtime.wire.executor import RankInfo


def describe(
    config: EngineConfig, model: ModelConfig, ranks: Sequence[RankInfo], stats: EngineStats
) -> dict[str, object]:
    """The choices of an engine and its ranks, and counts since the start, as plain values."""
    return {
        "version": __version__,
        "dtype": ranks[0].dtype,
        "device": ranks[0].device,
        "ep_size": len(ranks),
        "ranks": [_rank(rank) for rank in ranks],
        "kernels": ranks[0].kernels,
        "quantization": model.formats,
        "activation_quantization": config.activation_quantization,
        "dispatcher": config.dispatcher,
        "dispatchers": sorted(ranks[0].dispatchers),
        "capacity_factor": config.capacity_factor,
        "overflow": config.overflow,
        "balance_epsilon": config.balance_epsilon,
        "block_size": config.block_size,
        "kv_cache_dtype": ranks[0].kv_cache_dtype,
        "prefix_caching": {"enabled": why_off(config) is None, "reason": why_off(config)},
        "num_blocks": [sum(rank.num_pages) for rank in ranks],
        "windows": list(model.windows),
        "vocab_size": model.vocab_size,
        "default_sampling": dict(model.default_sampling),
        "placement_invariance": _placement_invariance(config, ranks),
        **stats.health_counts(),
    }


def _rank(rank: RankInfo) -> dict[str, Any]:
    """A rank under the names that users know: `num_blocks` for the pages of each page group, in order of `windows`."""
    return {"num_blocks" if name == "num_pages" else name: value for name, value in asdict(rank).items()}


def _placement_invariance(config: EngineConfig, ranks: Sequence[RankInfo]) -> str:
    """To what extent a request's tokens are independent of batches, chunks, ranks and placements."""
    if config.limits is not None and config.limits.changes_experts:
        return "none"
    if all(rank.batch_invariant for rank in ranks):
        return "bitwise"
    return "greedy tokens, float32" if ranks[0].dtype == "float32" else "none"
