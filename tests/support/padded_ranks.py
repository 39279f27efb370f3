"""Functions for ranks in the tests of padded dispatchers; in a module that the pool's processes can import."""

from __future__ import annotations

import torch
from dispatch_ranks import HIDDEN, SLOTS, expert
from no_sync import NoSync
from rank_pool import RankContext
from torch import Tensor

from moe_runtime.all2all.padded import make_padded


def run_padded(context: RankContext, work: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, list[int]]:
    """As `run_rank`, with all ranks' tokens padded to the same number; neither direction may wait for the device."""
    x_TD, slot_TK, weights_TK = (part.clone() for part in work[context.rank])
    way = make_padded(context.group if context.num_ranks > 1 else None, SLOTS)
    with NoSync() as mode:
        sent = way.dispatch(x_TD, slot_TK, [len(x) for x, _, _ in work])
    assert len(sent.row_R) == context.num_ranks * slot_TK.numel(), "its size must not depend on the data"
    y_RD = torch.full((len(sent.row_R), HIDDEN), float("nan"), dtype=x_TD.dtype)  # rows of no expert stay NaN
    slots = torch.arange(SLOTS).repeat_interleave(sent.counts_S).tolist()
    for place, slot in enumerate(slots):
        y_RD[place] = expert(sent.x_ND[sent.row_R[place]], context.rank * SLOTS + slot)
    with mode:
        out_TD = way.combine(y_RD, sent, weights_TK)
    assert "index" in mode.seen, "the mode sees ops"
    return out_TD, sent.counts_S.tolist()
