"""The sparse block in parts: gate, dispatch, experts, combine. It maps logical experts to slots.

Shape suffixes: T tokens, D hidden, E logical experts, K experts per token, L sparse layers, W ranks, S slots per rank,
R computations, N rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatched, Dispatcher, RoundDispatcher
from moe_runtime.all2all.rounds import place_among_equals
from moe_runtime.layers.batch import Batch
from moe_runtime.layers.capacity import LayerLimits
from moe_runtime.layers.kit import MLP, Experts, Gate, Norm
from moe_runtime.layers.side_stream import SideStream
from moe_runtime.memory.budget import tokens_at_once
from moe_runtime.wire.messages import PADDED, REPLICA_TURNS, ExpertWork


def part_size(tokens_per_rank: list[int], num_experts: int, top_k: int) -> int:
    """Tokens of each rank in one pass of a sparse layer on CPUs: equal parts of at most `tokens_at_once`."""
    most = max(tokens_per_rank)
    num_parts = max(1, -(-most // tokens_at_once(num_experts, top_k, len(tokens_per_rank))))
    return -(-most // num_parts)


class ExpertCounter:
    """Tokens per (phase, sparse layer, logical expert) on this rank, counted on the device without a sync."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.counts_2LE = torch.zeros(2, num_layers, num_experts, dtype=torch.int64, device=device)

    def layer(self, index: int) -> Tensor:
        """The counts `[2, E]` of one sparse layer, prefill then decode; the gate adds to them."""
        return self.counts_2LE[:, index]


class MoELayer:
    """A sparse block whose experts are in slots of all ranks, and the norm after it.

    An expert's tokens go to its replicas in turn: this rank's i-th token to entry `i % REPLICA_TURNS` of its list.

    Args:
        gate: chooses logical experts.
        slot_E: a global slot (`rank * S + local slot`) of each logical expert.
        experts: this rank's slots.
        shared: the experts that every token uses, or None.
        next_norm: the norm after it.
        dispatchers: by the name that a plan uses.
        limits: of experts and ranks, or None.
    """

    def __init__(
        self,
        gate: Gate,
        slot_E: Tensor,
        experts: Experts,
        shared: MLP | None,
        next_norm: Norm,
        dispatchers: Mapping[str, Dispatcher],
        limits: LayerLimits | None = None,
    ) -> None:
        self.gate = gate
        # The last row is for expert -1: assignments that a policy dropped are not sent.
        self.slot_EP = torch.cat((slot_E, slot_E.new_tensor([-1])))[:, None].repeat(1, REPLICA_TURNS)
        self.has_replicas = False
        self.experts = experts
        self.shared = shared
        self.next_norm = next_norm
        self.dispatchers = dispatchers
        self.limits = limits
        self._beside = SideStream(slot_E.device)

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.experts.nbytes + (self.shared.nbytes if self.shared else 0)

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The normed rows and the residual rows, which may overwrite `x_TD` and `residual_TD`.

        All ranks call it for the same step, even a rank without tokens.
        """
        way = self.dispatchers[batch.dispatcher]
        weights_TK, experts_TK, logits_TE = self.gate(x_TD, batch.num_decode, batch.policies)
        if self.limits is not None and self.limits.limits.changes_experts:
            weights_TK, experts_TK = self.limits.choose(logits_TE, weights_TK, experts_TK, self.slot_EP[:-1], batch)

        shared_TD = self._beside.start(self.shared, x_TD) if self.shared is not None else None

        # A captured step of several ranks is replayed later with other replica tables.
        is_replayed = batch.dispatcher == PADDED and len(batch.tokens_per_rank) > 1
        slot_TK = self._slots(experts_TK, in_turn=self.has_replicas or is_replayed)
        if self.limits is not None and self.limits.limits.queues:
            out_TD = self._in_rounds(way, self.limits, x_TD, slot_TK, weights_TK, batch)
        else:
            out_TD = self._in_parts(way, x_TD, slot_TK, weights_TK, batch)

        if shared_TD is not None:
            out_TD += shared_TD()
        return self.next_norm.add(out_TD, residual_TD)

    def use_replicas(self, expert: int, slots: list[int]) -> None:
        """From the next call on, send an expert's tokens to these global slots in turn; their number divides 64."""
        turns = torch.tensor(slots, device=self.slot_EP.device).repeat(REPLICA_TURNS // len(slots))
        self.slot_EP[expert] = turns
        self.has_replicas = bool((self.slot_EP != self.slot_EP[:, :1]).any())

    def _slots(self, experts_TK: Tensor, in_turn: bool) -> Tensor:
        """The global slot of each (token, k), `[T, K]`; -1 for expert -1. `in_turn` is False only without replicas."""
        if not in_turn:
            return self.slot_EP[experts_TK, 0]
        chosen = experts_TK.flatten()
        turn = place_among_equals(chosen, len(self.slot_EP) - 1)
        return self.slot_EP[chosen, turn % REPLICA_TURNS].view_as(experts_TK)

    def _in_parts(self, way: Dispatcher, x_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor, batch: Batch) -> Tensor:
        """Dispatch, experts and combine; on CPUs for `tokens_at_once` tokens of each rank at a time, in place."""
        size = most = max(batch.tokens_per_rank)
        if x_TD.device.type == "cpu":
            size = part_size(batch.tokens_per_rank, len(self.slot_EP) - 1, slot_TK.shape[1])
        if size == most:
            return self._pass(way, x_TD, slot_TK, weights_TK, batch, batch.tokens_per_rank)
        for first in range(0, most, size):
            part = slice(first, first + size)
            tokens_per_rank = [len(range(tokens)[part]) for tokens in batch.tokens_per_rank]
            x_TD[part] = self._pass(way, x_TD[part], slot_TK[part], weights_TK[part], batch, tokens_per_rank)
        return x_TD

    def _pass(
        self,
        way: Dispatcher,
        x_TD: Tensor,
        slot_TK: Tensor,
        weights_TK: Tensor,
        batch: Batch,
        tokens_per_rank: list[int],
    ) -> Tensor:
        """Dispatch, experts and combine."""
        sent = way.dispatch(x_TD, slot_TK, tokens_per_rank)
        return way.combine(self._compute(sent, batch), sent, weights_TK)

    def _in_rounds(
        self, way: Dispatcher, limits: LayerLimits, x_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor, batch: Batch
    ) -> Tensor:
        """Dispatch, experts and return path in as many rounds as the fullest slot of any rank needs, then the sum."""
        assert batch.limits is not None and isinstance(way, RoundDispatcher)
        capacities = limits.capacities(batch.tokens_per_rank)
        rounds = [
            way.bring_back(self._compute(sent, batch), sent)
            for sent in way.dispatch_rounds(x_TD, slot_TK, batch.tokens_per_rank, capacities)
        ]
        batch.limits.extra_rounds += len(rounds) - 1
        return way.combine_rounds(rounds, weights_TK)

    def _compute(self, sent: Dispatched, batch: Batch) -> Tensor:
        counts_S = sent.counts_S[: self.experts.num_slots]  # the rest are slots that only other ranks have
        work = batch.expert_work
        if self.limits is not None and batch.limits is not None:
            batch.limits.rows_L[self.limits.layer] += sent.counts_S.sum()
        if work is None:
            return self.experts(sent.x_ND, sent.row_R, counts_S, sent.room_RD)
        counts = counts_S.tolist()  # waits for the device, as the second synchronize does
        start = time.perf_counter()
        y_RD = self.experts(sent.x_ND, sent.row_R, counts_S, sent.room_RD)
        if y_RD.is_cuda:
            torch.cuda.synchronize(y_RD.device)
        seconds = time.perf_counter() - start
        work.append(ExpertWork(sum(count > 0 for count in counts), sum(counts), seconds))
        return y_RD
