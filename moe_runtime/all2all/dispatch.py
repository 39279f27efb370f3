"""Sends token rows to the ranks of their slots, and returns the experts' rows.

Shape suffixes: T this rank's tokens, K experts per token, D hidden, W ranks, S slots per rank, N rows that arrived
(each token once or more), R rows that experts compute here (one per token and expert), P padded tokens per rank.

Slot numbers are global: `rank * S + local slot`; -1 sends nothing. S is the most slots that any rank has. `dispatch`
returns the rows that this rank's experts must compute, grouped by slot; `combine` takes the experts' rows in that
order. One row comes back for every (token, k), and the token's own rank sums them in order of k. So the sum does not
depend on where the experts were.

`dispatch_rounds` does the same in dispatch rounds, which limit the rows that a slot gets at a time. The rows of each
round are returned before the next round. They are summed when all have arrived, so the sum does not depend on the
rounds either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.all2all.rounds import counts_of, in_round, num_rounds, place_among_equals, round_of
from moe_runtime.kernels import ops

# Renamed in torch 2.13; the old name warns there.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class RowOps:
    """The local work of a dispatcher. All dispatchers of an engine use the same one, so that all sum alike.

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
    """The work of this rank's experts.

    Attributes:
        x_ND: rows that arrived.
        row_R: which row of `x_ND` each computation reads, grouped by local slot.
        counts_S: computations per local slot.
        handle: input for `combine` of the same dispatcher.
        room_RD: memory for the experts' rows, if the dispatcher provides it.
    """

    x_ND: Tensor
    row_R: Tensor
    counts_S: Tensor
    handle: Any
    room_RD: Tensor | None = None


@dataclass(frozen=True)
class Returned:
    """Experts' rows that have returned to their tokens' rank.

    Attributes:
        y_RD: the rows.
        pair_R: the (token, k) of each row, `token * K + k`.
    """

    y_RD: Tensor
    pair_R: Tensor

    @classmethod
    def join(cls, rounds: list[Returned]) -> Returned:
        """The rows of all rounds."""
        if len(rounds) == 1:
            return rounds[0]
        return cls(torch.cat([part.y_RD for part in rounds]), torch.cat([part.pair_R for part in rounds]))


class Dispatcher(Protocol):
    """One way to send rows to experts and return them. All ranks of the group must call in the same order."""

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        """Send each token to its slots. `tokens_per_rank` [W] is from the step's plan and the same on all ranks."""

    def combine(self, y_RD: Tensor, sent: Dispatched, weights_TK: Tensor) -> Tensor:
        """Return the experts' rows, and sum each token's rows, weighted, in order of k: `[T, D]`."""


@runtime_checkable
class RoundDispatcher(Dispatcher, Protocol):
    """A dispatcher that also supports dispatch rounds."""

    def dispatch_rounds(
        self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int], capacity_W: list[int]
    ) -> Iterator[Dispatched]:
        """As `dispatch`, in dispatch rounds; all ranks have the same number of them. In each round a slot gets at most
        `capacity_W[w]` rows of rank `w`, in order of (token, k). Call `bring_back` for a round before taking the next.
        """

    def bring_back(self, y_RD: Tensor, sent: Dispatched) -> Returned:
        """Return the experts' rows of one round to their tokens' ranks."""

    def combine_rounds(self, rounds: list[Returned], weights_TK: Tensor) -> Tensor:
        """Sum the rows of all rounds as `combine` does."""


class LocalDispatcher:
    """All slots are on this rank: nothing is sent."""

    def __init__(self, num_slots: int, row_ops: RowOps = TORCH_ROWS) -> None:
        self.num_slots = num_slots
        self.row_ops = row_ops

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        order_R, counts_S = self.row_ops.group_by_slot(slot_TK.flatten(), self.num_slots)
        return Dispatched(x_TD, order_R // slot_TK.shape[1], counts_S, order_R)

    def combine(self, y_RD: Tensor, sent: Dispatched, weights_TK: Tensor) -> Tensor:
        return self.row_ops.combine(y_RD, sent.handle, weights_TK)

    def dispatch_rounds(
        self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int], capacity_W: list[int]
    ) -> Iterator[Dispatched]:
        round_TK = round_of(slot_TK, self.num_slots, capacity_W[0])
        counts_WS = counts_of(slot_TK.flatten(), self.num_slots)[None]
        for number in range(num_rounds(counts_WS, torch.tensor(capacity_W, device=slot_TK.device))):
            yield self.dispatch(x_TD, in_round(slot_TK, round_TK, number), tokens_per_rank)

    def bring_back(self, y_RD: Tensor, sent: Dispatched) -> Returned:
        return Returned(y_RD, sent.handle)

    def combine_rounds(self, rounds: list[Returned], weights_TK: Tensor) -> Tensor:
        rows = Returned.join(rounds)
        return self.row_ops.combine(rows.y_RD, rows.pair_R, weights_TK)


@dataclass(frozen=True)
class ReturnPath:
    """The splits of both directions, and the place of each row on its return."""

    order_R: Tensor  # grouped row -> row in the order of arrival
    sent_to: Tensor  # row in the order of sending -> its (token, k)
    send_splits: list[int]
    recv_splits: list[int]


class _GroupDispatcher:
    """Base of dispatchers over a process group: the group, and the return path, an exact all-to-all.

    Args:
        group: the ranks.
        num_slots: the most slots that any rank has, S.
        row_ops: how rows are grouped and summed.
    """

    def __init__(self, group: dist.ProcessGroup, num_slots: int, row_ops: RowOps = TORCH_ROWS) -> None:
        self.group = group
        self.row_ops = row_ops
        self.num_slots = num_slots
        self.num_ranks = group.size()

    def combine(self, y_RD: Tensor, sent: Dispatched, weights_TK: Tensor) -> Tensor:
        return self.combine_rounds([self.bring_back(y_RD, sent)], weights_TK)

    def bring_back(self, y_RD: Tensor, sent: Dispatched) -> Returned:
        path: ReturnPath = sent.handle
        y_send = torch.empty_like(y_RD)
        y_send[path.order_R] = y_RD
        y_back = y_RD.new_empty(sum(path.send_splits), y_RD.shape[1])
        dist.all_to_all_single(y_back, y_send, path.send_splits, path.recv_splits, group=self.group)
        return Returned(y_back, path.sent_to)

    def combine_rounds(self, rounds: list[Returned], weights_TK: Tensor) -> Tensor:
        rows = Returned.join(rounds)
        return self.row_ops.combine(rows.y_RD, rows.pair_R, weights_TK)


class AllToAllDispatcher(_GroupDispatcher):
    """Exchanges counts first, then exactly the needed rows; best for large batches, where bytes matter."""

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        W, S = self.num_ranks, self.num_slots
        sent_to, counts = self.row_ops.group_by_slot(slot_TK.flatten(), W * S)
        send_WS = counts.view(W, S)
        recv_WS = torch.empty_like(send_WS)
        dist.all_to_all_single(recv_WS, send_WS, group=self.group)
        return self._send(x_TD[sent_to // slot_TK.shape[1]], sent_to, send_WS, recv_WS)

    def dispatch_rounds(
        self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int], capacity_W: list[int]
    ) -> Iterator[Dispatched]:
        """Gathers the counts of all ranks once, where `dispatch` exchanges them; the rest follows from the counts."""
        W, S, rank = self.num_ranks, self.num_slots, self.group.rank()
        capacity_W1 = torch.tensor(capacity_W, device=slot_TK.device)[:, None]
        round_TK = round_of(slot_TK, W * S, capacity_W[rank])
        gathered = slot_TK.new_empty(W * W * S)
        all_gather(gathered, counts_of(slot_TK.flatten(), W * S), group=self.group)
        counts_WG = gathered.view(W, W * S)
        for number in range(num_rounds(counts_WG, capacity_W1[:, 0])):
            now_WG = (counts_WG - number * capacity_W1).clamp(min=0).minimum(capacity_W1)
            sent_to, _ = self.row_ops.group_by_slot(in_round(slot_TK, round_TK, number).flatten(), W * S)
            x_send = x_TD[sent_to // slot_TK.shape[1]]
            yield self._send(x_send, sent_to, now_WG[rank].view(W, S), now_WG[:, rank * S : (rank + 1) * S])

    def _send(self, x_send: Tensor, sent_to: Tensor, send_WS: Tensor, recv_WS: Tensor) -> Dispatched:
        W, S = self.num_ranks, self.num_slots
        send_splits: list[int] = send_WS.sum(1).tolist()
        recv_splits: list[int] = recv_WS.sum(1).tolist()
        x_ND = x_send.new_empty(sum(recv_splits), x_send.shape[1])
        dist.all_to_all_single(x_ND, x_send, recv_splits, send_splits, group=self.group)
        slot_N = torch.arange(S, device=x_send.device).repeat(W).repeat_interleave(recv_WS.flatten())
        order_R, counts_S = self.row_ops.group_by_slot(slot_N, S)
        return Dispatched(x_ND, order_R, counts_S, ReturnPath(order_R, sent_to, send_splits, recv_splits))


def gather_rows(x_TD: Tensor, slot_TK: Tensor, P: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """All ranks' tokens `[W * P, D]` and their slots `[W * P, K]` in one collective.

    Args:
        P: rows of every rank, at least T; rows beyond T are padding, with slots -1.
    """
    (T, D), K, W = x_TD.shape, slot_TK.shape[1], group.size()
    x_bytes, slot_bytes = D * x_TD.element_size(), K * 4
    packed = torch.empty(P, x_bytes + slot_bytes, dtype=torch.uint8, device=x_TD.device)
    packed[:T, :x_bytes] = x_TD.contiguous().view(torch.uint8)
    packed[:, x_bytes:] = 0xFF  # int32 -1
    packed[:T, x_bytes:] = slot_TK.to(torch.int32).contiguous().view(torch.uint8)
    gathered = packed.new_empty(W * P, packed.shape[1])
    all_gather(gathered, packed, group=group)
    x_ND = gathered[:, :x_bytes].contiguous().view(x_TD.dtype)
    return x_ND, gathered[:, x_bytes:].contiguous().view(torch.int32).long()


class AllGatherDispatcher(_GroupDispatcher):
    """Every rank gets every token and its slots in one collective, and computes all counts itself; best for small
    batches, where each collective costs its latency."""

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        x_ND, slot_NK = gather_rows(x_TD, slot_TK, max(tokens_per_rank), self.group)
        return self._arrange(x_ND, slot_NK, slot_TK)

    def dispatch_rounds(
        self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int], capacity_W: list[int]
    ) -> Iterator[Dispatched]:
        """Tokens are sent once; dispatch rounds limit the rows that are computed and returned at a time."""
        W, G, rank = self.num_ranks, self.num_ranks * self.num_slots, self.group.rank()
        x_ND, slot_NK = gather_rows(x_TD, slot_TK, max(tokens_per_rank), self.group)
        capacity_W1 = torch.tensor(capacity_W, device=slot_TK.device)[:, None]
        slot_WP = slot_NK.view(W, -1)
        source_W1 = torch.arange(W, device=slot_TK.device)[:, None]
        own_slot_WP = torch.where(slot_WP < 0, -1, slot_WP + source_W1 * G)  # a slot, separate for each source rank
        place_WP = place_among_equals(own_slot_WP.flatten(), W * G).view_as(slot_WP)
        round_NK = (place_WP // capacity_W1).view_as(slot_NK)
        round_TK = round_of(slot_TK, G, capacity_W[rank])
        counts_WG = counts_of(own_slot_WP.flatten(), W * G).view(W, G)
        for number in range(num_rounds(counts_WG, capacity_W1[:, 0])):
            yield self._arrange(x_ND, in_round(slot_NK, round_NK, number), in_round(slot_TK, round_TK, number))

    def _arrange(self, x_ND: Tensor, slot_NK: Tensor, slot_TK: Tensor) -> Dispatched:
        """The rows to compute here and their return path, from the slots of all tokens and of this rank's tokens."""
        K, W, S, rank = slot_TK.shape[1], self.num_ranks, self.num_slots, self.group.rank()
        local = torch.where(slot_NK // S == rank, slot_NK - rank * S, -1)
        order, counts_S = self.row_ops.group_by_slot(local.flatten(), S)
        # Rows return in the order of (token, k), which both ranks know.
        arrival = order.argsort()
        order_R = torch.empty_like(order)
        order_R[arrival] = torch.arange(order.numel(), device=order.device)
        recv_splits = (local >= 0).view(W, -1).sum(1).tolist()
        sent_to, counts_W = self.row_ops.group_by_slot(slot_TK.flatten().div(S, rounding_mode="floor"), W)
        path = ReturnPath(order_R, sent_to, counts_W.tolist(), recv_splits)
        return Dispatched(x_ND, order // K, counts_S, path)


def make_dispatchers(
    group: dist.ProcessGroup | None, num_slots: int, row_ops: RowOps = TORCH_ROWS
) -> dict[str, Dispatcher]:
    """The dispatchers that a plan may name: without a group only "local", else "all_to_all" and "all_gather"."""
    if group is None:
        return {"local": LocalDispatcher(num_slots, row_ops)}
    return {
        "all_to_all": AllToAllDispatcher(group, num_slots, row_ops),
        "all_gather": AllGatherDispatcher(group, num_slots, row_ops),
    }
