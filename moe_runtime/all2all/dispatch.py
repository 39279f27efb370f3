"""Token rows to the ranks of their slots, and the experts' rows back.

Shape suffixes: T this rank's tokens, K experts per token, D hidden, W ranks, S slots per rank, N rows that arrived
(each token once or more), R rows that experts compute here (one per token and expert), P padded tokens per rank.

A slot's number is global: `rank * S + local slot`; -1 sends nothing. `dispatch` gives the rows that this rank's experts
must compute, grouped by slot; `combine` takes the experts' rows in that order. One row comes back for every (token, k)
and the token's own rank sums them in order of k, so the sum does not depend on where the experts were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.kernels import ops

# Renamed in torch 2.13; the old name warns there.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class RowOps:
    """The local work of a dispatcher in one implementation: all ways of an engine take the same, so that all sum alike.

    Attributes:
        group_by_slot: see `ops.group_by_slot`.
        combine: `(y_RD, order_R, weights_TK) -> out_TD`, the weighted sum of each token's rows in order of k; row `i`
            is that of (token, k) number `order_R[i]`, and a (token, k) without a row adds nothing.
    """

    group_by_slot: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    combine: Callable[[Tensor, Tensor, Tensor], Tensor]


def _combine(y_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    num_pairs = weights_TK.numel()
    make = y_RD.new_empty if y_RD.shape[0] == num_pairs else y_RD.new_zeros
    y_TKD = make(*weights_TK.shape, y_RD.shape[1])
    y_TKD.flatten(0, 1)[order_R] = y_RD
    return ops.combine_topk(y_TKD, weights_TK)


TORCH_ROWS = RowOps(ops.group_by_slot, _combine)


@dataclass(frozen=True)
class Dispatched:
    """What this rank's experts compute.

    Attributes:
        x_ND: rows that arrived.
        row_R: which row of `x_ND` each computation reads, grouped by local slot.
        counts_S: computations per local slot.
        handle: what `combine` of the same dispatcher needs.
    """

    x_ND: Tensor
    row_R: Tensor
    counts_S: Tensor
    handle: Any


class Dispatcher(Protocol):
    """One way to bring rows to experts and back. All ranks of the group must call in the same order."""

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        """Send each token to its slots. `tokens_per_rank` [W] comes from the step's plan and is the same everywhere."""

    def combine(self, y_RD: Tensor, sent: Dispatched, weights_TK: Tensor) -> Tensor:
        """Bring the experts' rows back and sum each token's, weighted, in order of k: `[T, D]`."""


class LocalDispatcher:
    """All slots are here: nothing is sent."""

    def __init__(self, num_slots: int, row_ops: RowOps = TORCH_ROWS) -> None:
        self.num_slots = num_slots
        self.row_ops = row_ops

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        order_R, counts_S = self.row_ops.group_by_slot(slot_TK.flatten(), self.num_slots)
        return Dispatched(x_TD, order_R // slot_TK.shape[1], counts_S, order_R)

    def combine(self, y_RD: Tensor, sent: Dispatched, weights_TK: Tensor) -> Tensor:
        return self.row_ops.combine(y_RD, sent.handle, weights_TK)


@dataclass(frozen=True)
class _Route:
    """How rows went and how they come back: the splits of both directions and where each row belongs."""

    order_R: Tensor  # grouped row -> row in the order of arrival
    sent_to: Tensor  # row in the order of sending -> its (token, k)
    send_splits: list[int]
    recv_splits: list[int]


class _GroupDispatcher:
    """What dispatchers over a process group share: the group, and the way back, an exact all-to-all.

    Args:
        group: the ranks.
        num_slots: slots on every rank, S.
        row_ops: how rows are grouped and summed.
    """

    def __init__(self, group: dist.ProcessGroup, num_slots: int, row_ops: RowOps = TORCH_ROWS) -> None:
        self.group = group
        self.row_ops = row_ops
        self.num_slots = num_slots
        self.num_ranks = group.size()

    def combine(self, y_RD: Tensor, sent: Dispatched, weights_TK: Tensor) -> Tensor:
        route: _Route = sent.handle
        y_send = torch.empty_like(y_RD)
        y_send[route.order_R] = y_RD
        y_back = y_RD.new_empty(sum(route.send_splits), y_RD.shape[1])
        dist.all_to_all_single(y_back, y_send, route.send_splits, route.recv_splits, group=self.group)
        return self.row_ops.combine(y_back, route.sent_to, weights_TK)


class AllToAllDispatcher(_GroupDispatcher):
    """Counts first, then exactly the rows that are needed; best for large batches, where bytes matter."""

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        W, S = self.num_ranks, self.num_slots
        sent_to, counts = self.row_ops.group_by_slot(slot_TK.flatten(), W * S)
        send_WS = counts.view(W, S)
        recv_WS = torch.empty_like(send_WS)
        dist.all_to_all_single(recv_WS, send_WS, group=self.group)
        send_splits: list[int] = send_WS.sum(1).tolist()
        recv_splits: list[int] = recv_WS.sum(1).tolist()
        x_ND = x_TD.new_empty(sum(recv_splits), x_TD.shape[1])
        x_send = x_TD[sent_to // slot_TK.shape[1]]
        dist.all_to_all_single(x_ND, x_send, recv_splits, send_splits, group=self.group)
        slot_N = torch.arange(S, device=x_TD.device).repeat(W).repeat_interleave(recv_WS.flatten())
        order_R, counts_S = self.row_ops.group_by_slot(slot_N, S)
        return Dispatched(x_ND, order_R, counts_S, _Route(order_R, sent_to, send_splits, recv_splits))


class AllGatherDispatcher(_GroupDispatcher):
    """Everyone gets every token and its slots in one collective, and can work out all counts; best for small batches,
    where each collective costs its latency."""

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        (T, D), K, W, S = x_TD.shape, slot_TK.shape[1], self.num_ranks, self.num_slots
        P, rank = max(tokens_per_rank), self.group.rank()
        x_bytes, slot_bytes = D * x_TD.element_size(), K * 4
        packed = torch.empty(P, x_bytes + slot_bytes, dtype=torch.uint8, device=x_TD.device)
        packed[:T, :x_bytes] = x_TD.contiguous().view(torch.uint8)
        packed[:, x_bytes:] = 0xFF  # int32 -1: rows of padding go nowhere
        packed[:T, x_bytes:] = slot_TK.to(torch.int32).contiguous().view(torch.uint8)
        gathered = packed.new_empty(W * P, packed.shape[1])
        all_gather(gathered, packed, group=self.group)
        x_ND = gathered[:, :x_bytes].contiguous().view(x_TD.dtype)
        slot_NK = gathered[:, x_bytes:].contiguous().view(torch.int32).long()

        local = torch.where(slot_NK // S == rank, slot_NK - rank * S, -1)
        order, counts_S = self.row_ops.group_by_slot(local.flatten(), S)
        # Rows go back in the order of (token, k), which both sides know.
        arrival = order.argsort()
        order_R = torch.empty_like(order)
        order_R[arrival] = torch.arange(order.numel(), device=order.device)
        recv_splits = (local >= 0).view(W, -1).sum(1).tolist()
        sent_to, counts_W = self.row_ops.group_by_slot(slot_TK.flatten().div(S, rounding_mode="floor"), W)
        route = _Route(order_R, sent_to, counts_W.tolist(), recv_splits)
        return Dispatched(x_ND, order // K, counts_S, route)


def make_dispatchers(
    group: dist.ProcessGroup | None, num_slots: int, row_ops: RowOps = TORCH_ROWS
) -> dict[str, Dispatcher]:
    """The dispatchers that a plan may name: "local" alone without a group, else "all_to_all" and "all_gather"."""
    if group is None:
        return {"local": LocalDispatcher(num_slots, row_ops)}
    return {
        "all_to_all": AllToAllDispatcher(group, num_slots, row_ops),
        "all_gather": AllGatherDispatcher(group, num_slots, row_ops),
    }
