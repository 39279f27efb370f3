"""How the engine reaches its ranks: the seam between the front, which plans, and the ranks, which compute. No torch."""

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

    `num_pages` is the size of its KV cache in pages, `weight_bytes` what it holds of the model, `kernels` which
    implementation each operation uses, `pid` its process. `batch_invariant` promises that a row has the same bits in
    any batch, chunk and rank; `dispatchers` and `buckets` are those that a plan may name. `graph_bytes` is what the
    buckets' graphs and tensors take.
    """

    rank: int
    pid: int
    device: str
    dtype: str
    num_threads: int
    num_pages: int
    kv_cache_bytes: int
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
        max_inflight: how many submitted steps may wait for `collect`. 2: the next step is planned while one runs.
    """

    ranks: list[RankInfo]
    max_inflight: int

    def submit(self, plan: StepPlan) -> None:
        """Start a step. Raises RankError if a rank is gone."""

    def collect(self) -> list[RankResult]:
        """Results of the oldest submitted step, one per rank. Raises RankError at the deadline or if a rank is gone."""

    def expert_counts(self) -> np.ndarray:
        """Tokens per (rank, phase, MoE layer, logical expert) since the start: int64 [W, 2, L, E].

        The tokens are those that live on a rank, wherever their experts are. Phase 0 is prefill, 1 is decode. Call only
        while no step is in flight.
        """

    def request_counts(self) -> None:
        """Ask all ranks for their counts after the steps submitted so far; `reports` hands them out."""

    def send_task(self, rank: int, task: SlotTask) -> None:
        """Give a rank work to do after the steps submitted so far; `reports` tells how it went."""

    def reports(self) -> list[CountsReport | SlotReport]:
        """What ranks have reported outside steps since the last call; does not wait. Raises RankError."""

    def check(self) -> None:
        """Raise RankError if a rank has died. Cheap; called while there is no work."""

    def close(self) -> None:
        """End all ranks and wait for them. May be called twice."""
