"""Which form of the sparse block runs: the only table, used when a block is made and for each of its steps.

| kernels | limits | experts | step | form |
|---|---|---|---|---|
| native | none | all on this rank | any | `WHOLE`: one native call |
| native | none | on ranks that share memory | dispatcher "symmetric", not measured | `EXCHANGE`: one native call |
| native | none | on ranks that share memory | measured, padded, or another dispatcher | `PARTS` |
| native | none | on ranks that share no memory | any | `PARTS` |
| native | some | anywhere | any | `PARTS`: gate, dispatch, experts, combine one by one |
| torch | any | anywhere | any | `PARTS` |
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from moe_runtime.layers.batch import Batch


class SparseForm(Enum):
    """See the table above."""

    WHOLE = "whole"
    EXCHANGE = "exchange"
    PARTS = "parts"

    def in_step(self, batch: Batch) -> SparseForm:
        """The form in which a block of this form runs a step."""
        can_exchange = batch.dispatcher == "symmetric" and batch.expert_work is None
        return SparseForm.PARTS if self is SparseForm.EXCHANGE and not can_exchange else self


def native_sparse_form(*, holds_all: bool, dispatchers: Collection[str], has_limits: bool) -> SparseForm:
    """The form of a block of native parts.

    Args:
        holds_all: whether all experts are on this rank.
        dispatchers: that a plan may name.
        has_limits: on experts or ranks.
    """
    if has_limits:
        return SparseForm.PARTS
    if holds_all and set(dispatchers) == {"local"}:
        return SparseForm.WHOLE
    return SparseForm.EXCHANGE if "symmetric" in dispatchers else SparseForm.PARTS
