"""Which replica computes a (token, k): shares become quotas, quotas become tables, and a step only looks up tables.

Quotas are computed from the tokens that each rank sent to each expert in the last counted steps. They are whole tokens
that add up to the shares of `split_tokens` over all ranks. They keep tokens on their own rank as far as these shares
allow. The table of a rank interleaves its quotas. The rank's i-th token for an expert takes entry i (modulo the table's
length), so no step needs a collective for it. The choice depends only on the token's number among the rank's tokens
for the expert, never on other ranks' tokens. Which replica computes a token does not change its result.

Shape suffixes: E logical experts (rows are independent: the experts of several layers may be stacked), V ranks that
send, W ranks that compute, P entries of the table, H experts with replicas, J replicas, T tokens, K experts per token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.flow import Floats
from moe_runtime.balancer.placement import EMPTY

Ints = npt.NDArray[np.int64]


def whole_shares(share_EW: Floats, count_E: Ints) -> Ints:
    """int64 [E, W]: shares in whole tokens by largest remainders; a row adds up to its count. Ties go to low ranks."""
    exact_EW = share_EW * count_E[:, None]
    floor_EW = np.floor(exact_EW + 1e-9)
    place_EW = np.argsort(floor_EW - exact_EW, axis=1, kind="stable").argsort(axis=1)
    whole_EW: Ints = (floor_EW + (place_EW < (count_E - floor_EW.sum(axis=1))[:, None])).astype(np.int64)
    return whole_EW


def quotas(count_VE: npt.NDArray[np.integer], share_EW: Floats) -> Ints:
    """How many of each rank's tokens for each expert go to each rank.

    First, tokens stay on their own rank as far as its replica's share allows. The remaining tokens, ordered by sending
    rank, then fill the remaining shares, ordered by receiving rank.

    Args:
        count_VE: [V, E], tokens per rank and expert in the last steps.
        share_EW: [E, W], each replica's share of its expert's tokens.

    Returns:
        int64 [V, E, W]. The sum over the last axis is `count_VE`; the sum over the first is `whole_shares` of all
        tokens.
    """
    sent_VE = count_VE.astype(np.int64)
    room_EW = whole_shares(share_EW, sent_VE.sum(axis=0))
    stays_EW = np.minimum(sent_VE.T, room_EW)
    sent_VE, room_EW = sent_VE - stays_EW.T, room_EW - stays_EW
    to_VE, to_EW = sent_VE.cumsum(axis=0), room_EW.cumsum(axis=1)
    from_VE, from_EW = to_VE - sent_VE, to_EW - room_EW
    quota_VEW: Ints = np.minimum(to_VE[:, :, None], to_EW) - np.maximum(from_VE[:, :, None], from_EW)
    np.maximum(quota_VEW, 0, out=quota_VEW)
    rank = np.arange(len(sent_VE))
    quota_VEW[rank, :, rank] += stays_EW.T
    return quota_VEW


def replica_table(
    quota_EW: Ints, share_EW: Floats, slot_EW: npt.NDArray[np.integer], rank: int, length: int = 64
) -> npt.NDArray[np.int32]:
    """A rank's replicas in the order in which its tokens for an expert take them.

    Replica j with quota q_j of q tokens has its m-th turn at time (m + 1/2) q / q_j. The table holds the turns in order
    of time; at equal times the rank's own replica comes first. So q tokens give each replica exactly its quota if q is
    at most `length`; so do 2q, 3q ... tokens up to `length`. Any number n of tokens gives a replica n q_j / q, to
    within one for two replicas (at most two for more), plus the same deviation for each full pass through the table.
    For an expert of which the rank had no token, the table follows the shares, and its start differs between ranks.

    Args:
        quota_EW: [E, W], this rank's part of `quotas`.
        share_EW: [E, W], from `split_tokens`.
        slot_EW: [E, W], the global slot of each expert on each rank, -1 where it has none.
        rank: the rank that uses the table.
        length: P, a power of two.

    Returns:
        int32 [E, P], global slots.

    Raises:
        ValueError: `length` is not a power of two.
    """
    if length < 1 or length & (length - 1):
        raise ValueError(f"length: {length} is not allowed; it must be a power of two")
    num_ranks = slot_EW.shape[1]
    # columns in the cyclic order rank, rank + 1, ...: it breaks ties
    ranks = (np.arange(num_ranks) + rank) % num_ranks
    slot_EW, quota_EW, share_EW = slot_EW[:, ranks], quota_EW[:, ranks], share_EW[:, ranks]
    table_EP = np.repeat(slot_EW.max(axis=1).astype(np.int32)[:, None], length, axis=1)
    replicated_H = ((slot_EW != EMPTY).sum(axis=1) > 1).nonzero()[0]
    if not len(replicated_H):
        return table_EP
    no_token_H = quota_EW[replicated_H].sum(axis=1) == 0
    weight_HW = np.where(no_token_H[:, None], share_EW[replicated_H], quota_EW[replicated_H]).astype(np.float64)
    max_replicas = int((slot_EW[replicated_H] != EMPTY).sum(axis=1).max())
    column_HJ = np.argsort(slot_EW[replicated_H] == EMPTY, axis=1, kind="stable")[:, :max_replicas]
    weight_HJ = np.take_along_axis(weight_HW, column_HJ, axis=1)
    slot_HJ = np.take_along_axis(slot_EW[replicated_H], column_HJ, axis=1)
    with np.errstate(divide="ignore"):
        period_HJ = weight_HJ.sum(axis=1, keepdims=True) / weight_HJ
    turn_HJP = (np.arange(length) + 0.5) * period_HJ[:, :, None]
    order_HP = np.argsort(turn_HJP.reshape(len(replicated_H), -1), axis=1, kind="stable")[:, :length]
    table_HP = np.take_along_axis(slot_HJ, order_HP // length, axis=1)
    table_HP[no_token_H] = np.roll(table_HP[no_token_H], -(rank * length // num_ranks), axis=1)
    table_EP[replicated_H] = table_HP
    return table_EP


def slots_by_rank(slots_WS: npt.NDArray[np.integer], num_experts: int) -> Ints:
    """int64 [E, W]: the global slot, rank * S + slot, of each expert on each rank, -1 where it has none."""
    num_ranks, max_slots = slots_WS.shape
    slot_EW = np.full((num_experts, num_ranks), EMPTY, np.int64)
    rank, slot = (slots_WS != EMPTY).nonzero()
    slot_EW[slots_WS[rank, slot], rank] = rank * max_slots + slot
    return slot_EW


def choose_slots(table_EP: npt.NDArray[np.int32], experts_TK: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """int32 [T, K]: the global slot of each (token, k). This is the sparse block's choice on the device, in numpy.

    The (token, k) of an expert are numbered by row, then by k.
    """
    experts = experts_TK.ravel()
    order = np.argsort(experts, kind="stable")
    starts = np.searchsorted(experts[order], experts[order])
    ordinal = np.empty(len(experts), np.int64)
    ordinal[order] = np.arange(len(experts)) - starts
    chosen: npt.NDArray[np.int32] = table_EP[experts, ordinal % table_EP.shape[1]].reshape(experts_TK.shape)
    return chosen
