"""Counts of an engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.types.outputs import ExpertChanges

if TYPE_CHECKING:
    from moe_runtime.balancer.live.rebalancer import BalancerStats


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and how full the engine is now.

    `kv_cache_usage` is the share of pages held, 0 to 1. `prompt_tokens` and `generation_tokens` count tokens of
    prompts that gave a first token, and tokens generated. `dispatcher_steps` says how many steps each dispatcher ran,
    `finished` how many requests ended for which reason. `last_step_seconds` is that of the slowest rank.
    `expert_changes` is what capacity and load-aware routing did, `extra_rounds` the rounds of dispatch beyond one per
    layer that `overflow="queue"` took.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    dispatcher_steps: dict[str, int]
    finished: dict[str, int]
    last_step_seconds: float
    balancer: BalancerStats
    expert_changes: ExpertChanges = field(default_factory=ExpertChanges)
    extra_rounds: int = 0
