"""Dispatchers whose sizes follow from the number of tokens alone, so that the host never waits for the device.

All ranks have the same number of token rows, padding included; padding rows have only slots -1. With these dispatchers
a decode step can be captured in a CUDA graph. More is sent than is needed: every rank gets all tokens, and the return
path has room for every (token, k) from every rank. As in `dispatch`, rows are summed only after they have returned.

Shape suffixes: T tokens of each rank (padding included), K experts per token, D hidden, W ranks, S slots per rank,
N = W * T rows that arrive, R = N * K rows that experts may compute here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatched, Dispatcher, gather_rows
from moe_runtime.kernels import ops


class PaddedLocalDispatcher:
    """All slots are on this rank: nothing is sent."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        order_R, place_R, counts_S = ops.group_by_slot_padded(slot_TK.flatten(), self.num_slots)
        return Dispatched(x_TD, order_R // slot_TK.shape[1], counts_S, place_R.view_as(slot_TK))

    def combine(self, y_RD: Tensor, sent: Dispatched, weights_TK: Tensor) -> Tensor:
        return ops.combine_grouped(y_RD, sent.handle, weights_TK)


class PaddedDispatcher:
    """Sends by all-gather; returns by an all-to-all of equal parts.

    Args:
        group: the ranks.
        num_slots: the most slots that any rank has, S.
    """

    def __init__(self, group: dist.ProcessGroup, num_slots: int) -> None:
        self.group = group
        self.num_slots = num_slots
        self.num_ranks = group.size()
        self.rank = group.rank()

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        """All `tokens_per_rank` must be T."""
        (T, K), S = slot_TK.shape, self.num_slots
        assert tokens_per_rank == [T] * self.num_ranks, (tokens_per_rank, T)
        x_ND, slot_NK = gather_rows(x_TD, slot_TK, T, self.group)
        local_NK = torch.where(slot_NK // S == self.rank, slot_NK - self.rank * S, -1)
        order_R, place_R, counts_S = ops.group_by_slot_padded(local_NK.flatten(), S)
        # On the return path, (token, k) number i is row i of the part that its slot's rank sends back.
        pair_TK = torch.arange(T * K, device=slot_TK.device).view(T, K)
        back_TK = torch.where(slot_TK < 0, -1, slot_TK // S * (T * K) + pair_TK)
        return Dispatched(x_ND, order_R // K, counts_S, (place_R, back_TK))

    def combine(self, y_RD: Tensor, sent: Dispatched, weights_TK: Tensor) -> Tensor:
        place_R, back_TK = sent.handle
        y_send = y_RD[place_R.clamp(min=0)]  # the receiver does not read rows without a place here
        y_back = torch.empty_like(y_send)
        dist.all_to_all_single(y_back, y_send, group=self.group)
        return ops.combine_grouped(y_back, back_TK, weights_TK)


def make_padded(group: dist.ProcessGroup | None, num_slots: int) -> Dispatcher:
    """The padded dispatcher of a group, or of one rank alone."""
    return PaddedLocalDispatcher(num_slots) if group is None else PaddedDispatcher(group, num_slots)
