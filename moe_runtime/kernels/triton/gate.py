"""The gate in one kernel: scores, correction bias, expert groups, top-k, normalisation and scale.

One program per token. Experts form a block of groups (J) by members (M), each padded to a power of two;
K is the block of chosen experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.torch_ops import Scoring, check_contiguous, check_gate

# Below every choice, but above minus infinity even if two are summed. Experts whose choice is NaN are then selected
# before experts already taken, so that the chosen expert numbers are valid for any logits.
LOWEST = tl.constexpr(-1e38)


@triton.jit  # type: ignore[untyped-decorator]
def topk_gate_kernel(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    group_size: tl.tensor,
    scale: tl.tensor,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    GROUPS_BY_BEST: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Weights and experts of one token; `bias_ptr` may be `None`."""
    token = tl.program_id(0).to(tl.int64)
    group_J = tl.arange(0, BLOCK_J)
    member_M = tl.arange(0, BLOCK_M)
    is_expert_JM = (group_J[:, None] < NUM_GROUPS) & (member_M[None, :] < group_size)
    expert_JM = group_J[:, None] * group_size + member_M[None, :]

    logits_ptr += token * NUM_GROUPS * group_size
    logits_JM = tl.load(logits_ptr + expert_JM, mask=is_expert_JM, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores_JM = 1.0 / (1.0 + tl.exp(-logits_JM))
    else:
        scores_JM = tl.exp(logits_JM - tl.max(logits_JM))
        scores_JM = scores_JM / tl.sum(scores_JM)
    choice_JM = scores_JM
    if bias_ptr is not None:
        choice_JM += tl.load(bias_ptr + expert_JM, mask=is_expert_JM, other=0.0).to(tl.float32)
    choice_JM = tl.where(choice_JM > LOWEST, choice_JM, LOWEST)
    choice_JM = tl.where(is_expert_JM, choice_JM, float("-inf"))

    if NUM_GROUPS > 1:
        best_J = tl.max(choice_JM, 1)
        group_score_J = best_J
        if not GROUPS_BY_BEST:
            best_member_J = tl.min(tl.where(choice_JM == best_J[:, None], member_M[None, :], BLOCK_M), 1)
            group_score_J += tl.max(tl.where(member_M[None, :] == best_member_J[:, None], float("-inf"), choice_JM), 1)
        is_kept_J = group_J < 0
        for _ in range(TOPK_GROUPS):
            best_group = tl.min(tl.where(group_score_J == tl.max(group_score_J), group_J, BLOCK_J))
            is_kept_J = is_kept_J | (group_J == best_group)
            group_score_J = tl.where(group_J == best_group, float("-inf"), group_score_J)
        choice_JM = tl.where(is_kept_J[:, None], choice_JM, float("-inf"))

    k_K = tl.arange(0, BLOCK_K)
    weights_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    experts_K = tl.zeros((BLOCK_K,), dtype=tl.int64)
    total = 0.0
    for k in range(TOP_K):
        is_best_JM = choice_JM == tl.max(choice_JM)
        expert = tl.min(tl.where(is_best_JM, expert_JM, BLOCK_J * BLOCK_M))
        is_taken_JM = expert_JM == expert  # padding with the same number has score 0
        weight = tl.sum(tl.where(is_taken_JM, scores_JM, 0.0))
        choice_JM = tl.where(is_taken_JM, float("-inf"), choice_JM)
        weights_K = tl.where(k_K == k, weight, weights_K)
        experts_K = tl.where(k_K == k, expert, experts_K)
        total += weight
    if NORMALIZE:
        weights_K = weights_K / (total + 1e-20)
    tl.store(weights_ptr + token * TOP_K + k_K, weights_K * scale, mask=k_K < TOP_K)
    tl.store(experts_ptr + token * TOP_K + k_K, experts_K, mask=k_K < TOP_K)


def topk_gate_meta(
    num_experts: int,
    *,
    top_k: int,
    scoring: Scoring,
    num_groups: int,
    topk_groups: int,
    normalize: bool,
    groups_by_best: bool = False,
) -> dict[str, int]:
    """Constants and launch options of `topk_gate_kernel`."""
    return {
        "SIGMOID": scoring == "sigmoid",
        "NORMALIZE": normalize,
        "TOP_K": top_k,
        "NUM_GROUPS": num_groups,
        "TOPK_GROUPS": topk_groups,
        "GROUPS_BY_BEST": groups_by_best,
        "BLOCK_J": triton.next_power_of_2(num_groups),
        "BLOCK_M": triton.next_power_of_2(num_experts // num_groups),
        "BLOCK_K": triton.next_power_of_2(top_k),
        "num_warps": 1,  # a warp holds 512 experts in registers, and finds the best without a barrier
        "enable_fp_fusion": False,  # the weights are rounded as torch rounds them
    }


def topk_gate(
    logits_TE: Tensor,
    *,
    top_k: int,
    scoring: Scoring,
    correction_bias_E: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    groups_by_best: bool = False,
    normalize: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The Triton form of `torch_ops.topk_gate`, same arguments and result.

    Raises:
        ValueError: the gate has no meaning, or the logits or the bias are not contiguous.
    """
    num_tokens, num_experts = logits_TE.shape
    check_gate(num_experts, top_k, scoring, num_groups, topk_groups, groups_by_best)
    check_contiguous(logits_TE=logits_TE, correction_bias_E=correction_bias_E)
    weights_TK = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits_TE.device)
    experts_TK = torch.empty((num_tokens, top_k), dtype=torch.int64, device=logits_TE.device)
    if num_tokens == 0:
        return weights_TK, experts_TK
    meta = topk_gate_meta(
        num_experts,
        top_k=top_k,
        scoring=scoring,
        num_groups=num_groups,
        topk_groups=topk_groups,
        normalize=normalize,
        groups_by_best=groups_by_best,
    )
    group_size = num_experts // num_groups
    topk_gate_kernel[(num_tokens,)](
        logits_TE, correction_bias_E, weights_TK, experts_TK, group_size, float(scale), **meta
    )
    return weights_TK, experts_TK
