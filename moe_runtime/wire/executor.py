"""The engine's interface to its ranks: the front plans, the ranks compute. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moe_runtime.wire.messages import RankResult, SlotReport, SlotTask, StepPlan

if TYPE_CHECKING:
    import numpy as np


class RankError(RuntimeError):
    """A rank died, reported an error, or did not answer in time. The message names the rank."""


@dataclass(frozen=True)
class RankInfo:
    """What a rank reports once it is ready.

    `num_pages` are the pages of each page group in its KV cache, `kv_cache_dtype` is the dtype of its rows.
    `weight_bytes` is the size of its weights. `kernels` names the implementation of each operation. `pid` is its
    process id. `batch_invariant` guarantees that a row has the same bits in any batch, chunk and rank. A plan may name
    any of `dispatchers` and `buckets`. `graph_bytes` is the memory of the buckets' graphs and tensors.
    """

    rank: int
    pid: int
    device: str
    dtype: str
    num_threads: int
    num_pages: tuple[int, ...]
    kv_cache_bytes: int
    kv_cache_dtype: str
    weight_bytes: int
    load_seconds: float
    kernels: dict[str, str]
    batch_invariant: bool
    dispatchers: tuple[str, ...]
    buckets: tuple[int, ...] = ()
    graph_bytes: int = 0


@dataclass(frozen=True)
class CountsReport:
    """A rank's expert counts, int64 [2, L, E], as in `Executor.expert_counts`."""

    rank: int
    counts_2LE: np.ndarray


class Executor(Protocol):
    """Runs step plans on all ranks, in the order in which they are submitted.

    Attributes:
        ranks: what each rank reported, in order of rank.
        max_inflight: how many submitted steps may wait for `collect`. With 2, one step is planned while another runs.
    """

    ranks: list[RankInfo]
    max_inflight: int

    def submit(self, plan: StepPlan) -> None:
        """Start a step. Raises RankError if a rank is gone."""

    def collect(self) -> list[RankResult]:
        """Results of the oldest submitted step, one per rank. Raises RankError at the deadline or if a rank is gone."""

    def expert_counts(self) -> np.ndarray:
        """Tokens per (rank, phase, MoE layer, logical expert) since the start: int64 [W, 2, L, E].

        A token counts for the rank that runs its sequence, wherever its experts are. Phase 0 is prefill, 1 is decode.
        Call only while no step is in flight.
        """

    def forget(self) -> None:
        """Drop all sequences, expert counts and pending reports, as if no step had run. Call with no step in flight."""

    def request_counts(self) -> None:
        """Ask all ranks for their counts after the steps submitted so far; `reports` returns them."""

    def send_task(self, rank: int, task: SlotTask) -> None:
        """Give a rank work to do after the steps submitted so far; `reports` returns the outcome."""

    def reports(self) -> list[CountsReport | SlotReport]:
        """What ranks have reported outside of steps since the last call. Does not wait. Raises RankError."""

    def check(self) -> None:
        """Raise RankError if a rank has died. A cheap call, made while there is no work."""

    def close(self) -> None:
        """End all ranks and wait for them. May be called twice."""
