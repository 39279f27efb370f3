"""Limits on the assignments of experts and ranks in a step: capacity, and a choice between near-equal experts by load.

An assignment is one (token, k) of a layer. Everything here concerns one source rank and needs no collective.

Shape suffixes: T tokens, K experts per token, E logical experts, W ranks, P entries of a replica list, L sparse layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_runtime.all2all.rounds import counts_of, place_among_equals
from moe_runtime.config.limits import Limits
from moe_runtime.config.model import MoEConfig
from moe_runtime.kernels import torch_ops
from moe_runtime.layers.batch import Batch, StepLimits
from moe_runtime.layers.gate import count_choices
from moe_runtime.types.outputs import ExpertChanges
from moe_runtime.wire.messages import RankPlan, RankResult, SequenceChanges

NONE = -torch.inf  # a choice that cannot be made


class LayerLimits:
    """The limits in one sparse layer.

    Args:
        limits: as the user set them.
        config, correction_bias_E: the layer's gate; as for `TorchGate`.
        counts_2E: tokens of each expert, as for `TorchGate`. If the limits change experts, they are counted here, and
            the gate must not count them.
        layer: number of the sparse layer.
        num_slots: the most slots that any rank has; global slot numbers are based on it.
    """

    def __init__(
        self,
        limits: Limits,
        config: MoEConfig,
        correction_bias_E: Tensor | None,
        counts_2E: Tensor,
        layer: int,
        num_slots: int,
    ) -> None:
        self.limits = limits
        self.config = config
        self.correction_bias_E = correction_bias_E
        self.counts_2E = counts_2E
        self.layer = layer
        self.num_slots = num_slots

    def capacities(self, tokens_per_rank: list[int]) -> list[int]:
        """The capacity of an expert for each rank's tokens."""
        return [self._capacity(num_tokens) for num_tokens in tokens_per_rank]

    def choose(
        self, logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor, slot_EP: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The gate's choice within the limits: `(weights_TK, experts_TK)`, counted and kept.

        A token whose experts do not change keeps its weights, bit for bit.

        Args:
            logits_TE: of the gate.
            slot_EP: the slots of each expert, in turn.
        """
        limits, config, step = self.limits, self.config, batch.limits
        assert step is not None
        scores_TE, choice_TE = torch_ops.gate_scores(
            logits_TE,
            scoring=config.scoring,
            correction_bias_E=self.correction_bias_E,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            groups_by_best=config.groups_by_best,
        )
        before_TK = experts_TK
        nothing_T = torch.zeros(len(logits_TE), dtype=torch.int64, device=logits_TE.device)
        moved_T = rerouted_T = dropped_T = nothing_T
        if limits.balance_epsilon is not None and step.rank_rows_LW is not None:
            experts_TK, moved_T = prefer_light_ranks(
                scores_TE,
                choice_TE,
                experts_TK,
                rank_of_experts(slot_EP, self.num_slots),
                step.rank_rows_LW[self.layer],
                limits.balance_epsilon,
            )
        if limits.limits_choices:
            room = self._capacity(len(logits_TE))
            if limits.overflow == "reroute":
                experts_TK, rerouted_T, dropped_T = reroute(choice_TE, experts_TK, room)
            else:
                experts_TK, dropped_T = drop(experts_TK, config.num_experts, room)
        weights_TK = _weights(config, scores_TE, weights_TK, experts_TK, before_TK)
        step.changes_T3 += torch.stack((moved_T, rerouted_T, dropped_T), dim=1)
        count_choices(self.counts_2E, experts_TK, batch.num_decode)
        if batch.policies is not None and batch.policies.chosen_LTK is not None:
            batch.policies.chosen_LTK[self.layer] = experts_TK
        return weights_TK, experts_TK

    def _capacity(self, num_tokens: int) -> int:
        return self.limits.capacity(num_tokens, self.config.top_k, self.config.num_experts)


def over_capacity(experts_TK: Tensor, num_experts: int, room: int) -> Tensor:
    """Which assignments exceed their expert's capacity, bool `[T, K]`; False for -1.

    The order is all tokens' first choices, in batch order, then their second choices, and so on (GShard's order).
    """
    place_TK = place_among_equals(experts_TK.T.flatten(), num_experts).view(experts_TK.T.shape).T
    return (place_TK >= room) & (experts_TK >= 0)


def drop(experts_TK: Tensor, num_experts: int, room: int) -> tuple[Tensor, Tensor]:
    """`(experts_TK, dropped_T)`: assignments over capacity become -1; also returns their number for each token."""
    over_TK = over_capacity(experts_TK, num_experts, room)
    return experts_TK.masked_fill(over_TK, -1), over_TK.sum(1)


def reroute(choice_TE: Tensor, experts_TK: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(experts_TK, rerouted_T, dropped_T)`: assignments over capacity go to the token's next-best expert with room.

    This runs in passes. In each pass, every token that still has such an assignment asks its next-best other expert.
    An expert accepts tokens in batch order while it has room, and takes the token's best remaining assignment. When no
    token has an expert left to ask, the remaining assignments are dropped: -1.

    Args:
        choice_TE: scores by which the gate chooses; `-inf` for experts that it can't choose.
        room: assignments that an expert takes.
    """
    num_experts = choice_TE.shape[1]
    over_TK = over_capacity(experts_TK, num_experts, room)
    room_E = room - counts_of(experts_TK.masked_fill(over_TK, -1).flatten(), num_experts)
    others_TE = _without(choice_TE, experts_TK)
    values_TE, order_TE = others_TE.sort(dim=1, descending=True, stable=True)
    experts_TK, rerouted_T = experts_TK.masked_fill(over_TK, -1), torch.zeros_like(over_TK[:, 0], dtype=torch.int64)
    for asked_T, value_T in zip(order_TE.T, values_TE.T, strict=True):
        asks_T = over_TK.any(1) & (value_T > NONE)
        if not bool(asks_T.any()):
            break
        wanted_T = torch.where(asks_T, asked_T, -1)
        takes_T = asks_T & (place_among_equals(wanted_T, num_experts) < room_E[asked_T])
        placed_TK = over_TK & (over_TK.cumsum(1) == 1) & takes_T[:, None]
        experts_TK = torch.where(placed_TK, asked_T[:, None], experts_TK)
        over_TK = over_TK & ~placed_TK
        room_E = room_E - counts_of(torch.where(takes_T, asked_T, -1), num_experts)
        rerouted_T = rerouted_T + takes_T
    return experts_TK, rerouted_T, over_TK.sum(1)


def prefer_light_ranks(
    scores_TE: Tensor, choice_TE: Tensor, experts_TK: Tensor, rank_E: Tensor, rows_W: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`(experts_TK, moved_T)`: replaces some experts on ranks above the mean load by near-equal ones on ranks below it.

    A token may replace its last chosen expert on a rank above the mean. The new expert is the token's best unused one
    on a rank below the mean. Its score must be at least `1 - epsilon` times the old expert's score. A rank above the
    mean gives away at most the share `(load - mean) / load` of its assignments. A rank below the mean receives at most
    the share `(mean - load) / total load` of all assignments. Both limits are rounded up and used in batch order. The
    new expert takes the old one's place `k`.

    Args:
        scores_TE: of the gate; positive.
        choice_TE: scores by which the gate chooses; `-inf` for experts that it can't choose.
        rank_E: the rank of each expert; -1 for experts on several ranks, which are neither replaced nor used.
        rows_W: float64, the load of each rank.
    """
    num_ranks = len(rows_W)
    mean = rows_W.mean()
    rank_TK = torch.where(experts_TK >= 0, rank_E[experts_TK], -1)
    goes_TK = (rank_TK >= 0) & (rows_W > mean)[rank_TK]
    goes_TK &= goes_TK.flip(1).cumsum(1).flip(1) == 1
    comes_E = (rank_E >= 0) & (rows_W < mean)[rank_E]
    value_T, to_T = _without(choice_TE.masked_fill(~comes_E, NONE), experts_TK).max(1)
    from_T = (experts_TK * goes_TK).sum(1)
    score_from_T, score_to_T = (scores_TE.gather(1, expert_T[:, None])[:, 0] for expert_T in (from_T, to_T))
    may_T = goes_TK.any(1) & (value_T > NONE) & (score_to_T >= (1 - epsilon) * score_from_T)

    own_W, num_own = counts_of(rank_TK.flatten(), num_ranks), (experts_TK >= 0).sum()
    gives_W = torch.where(rows_W > mean, (own_W * (1 - mean / rows_W)).ceil(), 0)
    takes_W = torch.where(rows_W < mean, (num_own * ((mean - rows_W) / rows_W.sum())).ceil(), 0)
    leaving_T = torch.where(may_T, rank_E[from_T], -1)
    may_T &= place_among_equals(leaving_T, num_ranks) < gives_W[leaving_T]
    coming_T = torch.where(may_T, rank_E[to_T], -1)
    may_T &= place_among_equals(coming_T, num_ranks) < takes_W[coming_T]
    return torch.where(goes_TK & may_T[:, None], to_T[:, None], experts_TK), may_T.long()


def rank_of_experts(slot_EP: Tensor, num_slots: int) -> Tensor:
    """The rank of each expert; -1 if it has several slots."""
    first_E = slot_EP[:, 0]
    return torch.where((slot_EP == slot_EP[:, :1]).all(1), first_E // num_slots, -1)


def step_limits(rank_rows: list[list[int]], num_tokens: int, num_layers: int, device: torch.device) -> StepLimits:
    """The limits at a step's start. `rank_rows` [W][L] are each rank's rows in an earlier step; empty: unknown."""
    rows_LW = torch.tensor(rank_rows, dtype=torch.float64, device=device).T if rank_rows else None
    zeros_T3, zeros_L = (
        torch.zeros(*size, dtype=torch.int64, device=device) for size in ((num_tokens, 3), (num_layers,))
    )
    return StepLimits(rows_LW, zeros_T3, zeros_L)


def with_limits(result: RankResult, work: RankPlan, limits: StepLimits) -> RankResult:
    """A step's result with the effects of the limits: the changes of each sequence's chunk, if any."""
    parts = limits.changes_T3.cpu().split([chunk.num_tokens for chunk in work.chunks])
    changes = (ExpertChanges(*part.sum(0).tolist()) for part in parts)
    return replace(
        result,
        expert_changes=[
            SequenceChanges(chunk.seq_id, found)
            for chunk, found in zip(work.chunks, changes, strict=True)
            if found != ExpertChanges()
        ],
        expert_rows=limits.rows_L.tolist(),
        extra_rounds=limits.extra_rounds,
    )


def _without(choice_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Choices among the experts that a token does not use; NaN can't be chosen."""
    used_TE = torch.zeros(choice_TE.shape[0], choice_TE.shape[1] + 1, dtype=torch.bool, device=choice_TE.device)
    used_TE.scatter_(1, experts_TK % used_TE.shape[1], True)
    return choice_TE.masked_fill(used_TE[:, :-1] | choice_TE.isnan(), NONE)


def _weights(config: MoEConfig, scores_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor, before_TK: Tensor) -> Tensor:
    """The weights of tokens whose experts have changed, computed as in the gate; other tokens keep theirs."""
    score_TK = scores_TE.gather(1, experts_TK.clamp(min=0)).masked_fill(experts_TK < 0, 0.0)
    if config.normalize_topk:
        score_TK = score_TK / (score_TK.sum(-1, keepdim=True) + 1e-20)
    stays_T1 = (experts_TK == before_TK).all(1, keepdim=True)
    return torch.where(stays_T1, weights_TK, score_TK * config.routed_scaling_factor)
