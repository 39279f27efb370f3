"""Chooses the shape of a step on all ranks: its dispatcher, and the bucket of a captured step. No torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moe_runtime.memory.graph_buckets import ALL_GATHER_MAX_TOKENS
from moe_runtime.wire.messages import PADDED


class StepShapes:
    """The choice for every step of an engine.

    Args:
        dispatcher: the dispatcher of all steps; "auto" chooses one of `available` from a step's number of tokens.
        available: dispatchers that all ranks have.
        buckets: numbers of rows, ascending, for which all ranks have captured decode-only steps.
    """

    def __init__(
        self,
        dispatcher: str = "auto",
        available: Collection[str] = ("local", "all_gather", "all_to_all"),
        buckets: Sequence[int] = (),
    ) -> None:
        self._dispatcher = dispatcher
        self._available = frozenset(available)
        self._buckets = tuple(buckets)

    def choose(self, tokens_per_rank: list[int], is_plain: bool) -> tuple[str, int]:
        """`(dispatcher, bucket)`; bucket 0 means none.

        Args:
            is_plain: all rows are decode rows, and no request has an expert policy or returns routed experts.
        """
        if is_plain and (bucket := self._bucket(max(tokens_per_rank))):
            return PADDED, bucket
        return self._choose_dispatcher(tokens_per_rank), 0

    def _bucket(self, num_rows: int) -> int:
        """The smallest bucket that holds the rows of every rank; 0 if there is none."""
        return next((bucket for bucket in self._buckets if bucket >= num_rows), 0)

    def _choose_dispatcher(self, tokens_per_rank: list[int]) -> str:
        if self._dispatcher != "auto":
            return self._dispatcher
        if len(tokens_per_rank) == 1:
            return "local"
        if "symmetric" in self._available:
            return "symmetric"
        return "all_gather" if max(tokens_per_rank) <= ALL_GATHER_MAX_TOKENS else "all_to_all"
