"""Our gate and those of `deepspeed.moe.sharded_moe` on the same scores: the same experts, the same weights."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate, top1gating, top2gating, topkgating
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime.kernels import torch_ops

NO_CAPACITY = {"capacity_factor": 1.0, "min_capacity": 0, "drop_tokens": False, "sparse_routes": True}


def ours(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return torch_ops.topk_gate(logits_TE, top_k=top_k, scoring="softmax", normalize=top_k > 1)


def deepspeed(logits_TE: Tensor, top_k: int, **options: float | bool) -> tuple[Tensor, Tensor]:
    """`(weights_TK, experts_TK)`; an expert of -1 was dropped."""
    logits_TE = logits_TE.clone()
    if top_k == 1:
        found = top1gating(logits_TE, use_rts=False, **{**NO_CAPACITY, **options})
    elif top_k == 2:
        found = top2gating(logits_TE, top2_2nd_expert_sampling=False, **{**NO_CAPACITY, **options})
    else:
        found = topkgating(logits_TE, top_k, **{**NO_CAPACITY, **options})
    _, _, _, experts_KT, _, weights_KT, _ = found
    return weights_KT.T, experts_KT.T.long()


def spread(weights_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    """Weights by expert, `[T, E]`; what was dropped is left out."""
    out_TE = torch.zeros(len(weights_TK), num_experts + 1, dtype=weights_TK.dtype)
    return out_TE.scatter_add(1, experts_TK % (num_experts + 1), weights_TK)[:, :num_experts]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 200), st.integers(8, 64), st.integers(0, 2**31))
def test_nothing_dropped_is_the_same(top_k: int, tokens: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order_TE = torch.rand(tokens, experts, generator=generator).argsort(-1)
    logits_TE = order_TE * (0.05 + torch.rand(tokens, 1, generator=generator))  # far enough apart to have no ties
    weights_TK, experts_TK = ours(logits_TE, top_k)
    their_weights_TK, their_experts_TK = deepspeed(logits_TE, top_k)
    assert torch.equal(their_experts_TK.sort(-1).values, experts_TK.sort(-1).values)
    torch.testing.assert_close(
        spread(their_weights_TK, their_experts_TK, experts), spread(weights_TK, experts_TK, experts)
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_capacity_that_suffices_is_the_same(top_k: int) -> None:
    logits_TE = torch.randn(64, 16) * 3
    weights_TK, experts_TK = ours(logits_TE, top_k)
    theirs = deepspeed(logits_TE, top_k, drop_tokens=True, capacity_factor=16.0)
    assert (theirs[1] >= 0).all()
    torch.testing.assert_close(spread(*theirs, 16), spread(weights_TK, experts_TK, 16))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_dropping_takes_weights_away_from_what_ours_chooses(top_k: int) -> None:
    """A meant difference: with a capacity DeepSpeed drops choices, ours never does. What is kept was our choice; the
    kept weights are ours, for k above 1 divided by their sum again."""
    logits_TE = torch.randn(64, 16) * 3
    weights_TE = spread(*ours(logits_TE, top_k), 16)
    kept_TE = spread(*deepspeed(logits_TE, top_k, drop_tokens=True, capacity_factor=0.5), 16)
    dropped_TE = (weights_TE > 0) & (kept_TE == 0)
    assert dropped_TE.any()
    expected_TE = weights_TE.masked_fill(dropped_TE, 0.0)
    if top_k > 1:
        expected_TE /= expected_TE.sum(-1, keepdim=True).clamp(min=1e-20)
    torch.testing.assert_close(kept_TE, expected_TE)


def test_second_expert_of_deepspeed_is_drawn_unless_told_otherwise() -> None:
    """A meant difference: `top2_2nd_expert_sampling`, on by default, adds noise to the second choice, also when
    evaluating. The first choice stays."""
    logits_TE = torch.randn(512, 16)
    _, _, _, experts_KT, _, _, _ = top2gating(logits_TE.clone(), **NO_CAPACITY)
    _, experts_TK = ours(logits_TE, 2)
    assert torch.equal(experts_KT[0].long(), experts_TK[:, 0])
    assert not torch.equal(experts_KT[1].long(), experts_TK[:, 1])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ties_go_to_the_lowest_expert_in_ours(top_k: int) -> None:
    """A meant difference for k of 3 and more: DeepSpeed takes `torch.topk`'s order, which promises none. For k of 1
    and 2 it takes the lowest expert too."""
    logits_TE = torch.randint(0, 2, (256, 16)).float()
    weights_TK, experts_TK = ours(logits_TE, top_k)
    their_weights_TK, their_experts_TK = deepspeed(logits_TE, top_k)
    assert torch.equal(experts_TK, logits_TE.argsort(descending=True, stable=True)[:, :top_k])
    if top_k < 3:
        assert torch.equal(their_experts_TK, experts_TK)
    torch.testing.assert_close(their_weights_TK.sort(-1).values, weights_TK.sort(-1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_is_computed_in_float32(dtype: torch.dtype) -> None:
    """DeepSpeed widens inputs and router weight first; `gate_float32` is the same here."""
    gate = TopKGate(48, 16, k=4, drop_tokens=False, min_capacity=0).to(dtype)
    x_TD = torch.randn(200, 48).to(dtype)
    _, _, _, experts_KT, _, weights_KT, _ = gate(x_TD, None, True)
    logits_TE = torch.nn.functional.linear(x_TD.float(), gate.wg.weight.detach().float())
    weights_TK, experts_TK = ours(logits_TE, 4)
    torch.testing.assert_close(
        spread(weights_KT.T.detach(), experts_KT.T.long(), 16), spread(weights_TK, experts_TK, 16)
    )
