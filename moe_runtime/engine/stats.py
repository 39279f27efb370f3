"""Counts of an engine. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.types.outputs import ExpertChanges

if TYPE_CHECKING:
    from moe_runtime.balancer.live.rebalancer import BalancerStats


@dataclass(frozen=True)
class PageCounts:
    """Pages of one page group on all ranks.

    Attributes:
        window: of the group's layers; None for none.
        total, used: how many there are, and how many sequences hold. The others are free, also if the prefix cache
            knows their content.
    """

    window: int | None
    total: int
    used: int

    @property
    def usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return self.used / self.total


@dataclass(frozen=True)
class PrefixCounts:
    """Counts of the prefix cache since the start.

    Attributes:
        queries: tokens of admitted requests that were looked up.
        hits: those of them that were found, and so not computed.
        evictions: pages whose content was forgotten, because a sequence needed the page.
    """

    queries: int = 0
    hits: int = 0
    evictions: int = 0

    def __add__(self, other: PrefixCounts) -> PrefixCounts:
        return PrefixCounts(self.queries + other.queries, self.hits + other.hits, self.evictions + other.evictions)


@dataclass(frozen=True)
class OverloadCounts:
    """Whether new requests get fewer experts per token because many wait, and how many requests have got fewer."""

    is_active: bool = False
    num_requests: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and how full the engine is now.

    `page_counts` has the pages of each page group. `prompt_tokens` counts tokens of prompts that have produced their
    first output token. `generation_tokens` counts generated tokens. `dispatcher_steps` counts steps per dispatcher,
    `finished` counts requests per finish reason. `last_step_seconds` is the time of the slowest rank. `expert_changes`
    counts changes by capacity limits and `balance_epsilon`. `num_admitted` counts requests that a rank has begun to
    run. `extra_rounds` counts the dispatch rounds beyond one per layer, which `overflow="queue"` adds. `prefix_cache`
    sums over the ranks.
    """

    num_running: int
    num_waiting: int
    page_counts: tuple[PageCounts, ...]
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
    prefix_cache: PrefixCounts = field(default_factory=PrefixCounts)
    num_admitted: int = 0
    overload: OverloadCounts = field(default_factory=OverloadCounts)

    @property
    def kv_cache_usage(self) -> float:
        """Share of pages in use, 0 to 1, of the page group that is fullest."""
        return max(counts.usage for counts in self.page_counts)

    def health_counts(self) -> dict[str, object]:
        """The counts that `/health` shows."""
        return {
            "dispatcher_steps": self.dispatcher_steps,
            "expert_changes": asdict(self.expert_changes),
            "extra_rounds": self.extra_rounds,
        }
