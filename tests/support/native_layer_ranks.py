"""Functions for ranks in the tests of native layers over shared memory; in a module that the pool can import."""

from __future__ import annotations

import random

import pytest
import torch
from cpu_cases import experts_of, normal
from rank_pool import RankContext

from moe_runtime.all2all.symmetric import SymmetricDispatcher
from moe_runtime.kernels.cpu import loader, native
from moe_runtime.kernels.cpu.blocks import GateCall, LayerPolicies
from moe_runtime.layers.batch import Batch, StepPolicies
from moe_runtime.layers.native_layers import NativeGate, NativeMLP, NativeMoELayer, NativeNorm

EXPERTS, SLOTS, TOP_K, HIDDEN, INNER = 5, 5, 3, 72, 40


def make_layer(
    context: RankContext, seed: int, dtype: torch.dtype, timeout: float = 30, **options: int
) -> NativeMoELayer:
    """A layer whose experts take slots in turn, so that all have replicas. Each slot has different weights, so that a
    test can distinguish replicas."""
    torch.manual_seed(seed)  # the same weights everywhere
    kernels, num_slots = loader.load(), context.num_ranks * SLOTS
    way = SymmetricDispatcher(
        context.group, SLOTS, max_tokens=64, hidden_size=HIDDEN, top_k=TOP_K, dtype=dtype, timeout=timeout, **options
    )
    w13, w2 = normal(num_slots, 2 * INNER, HIDDEN, dtype=dtype) / 8, normal(num_slots, HIDDEN, INNER, dtype=dtype) / 8
    shared = experts_of(kernels, normal(1, 34, HIDDEN, dtype=dtype) / 8, normal(1, HIDDEN, 17, dtype=dtype) / 8)
    config = native.gate_config(EXPERTS, top_k=TOP_K, scoring="softmax", normalize=True)
    gate = NativeGate(GateCall(kernels, config, normal(EXPERTS, HIDDEN, dtype=dtype) / 8), 0)
    norm = NativeNorm(kernels, normal(HIDDEN, dtype=dtype), 1e-6)
    own = slice(context.rank * SLOTS, (context.rank + 1) * SLOTS)
    experts = experts_of(kernels, w13[own], w2[own])
    layer = NativeMoELayer(gate, torch.arange(EXPERTS), experts, NativeMLP(shared), norm, {"symmetric": way})
    for expert in range(EXPERTS):
        slots = list(range(expert, num_slots, EXPERTS))
        layer.use_replicas(expert, slots[: 1 << (len(slots).bit_length() - 1)])
    return layer


def run_steps(context: RankContext, seed: int, dtype: torch.dtype, max_bytes: int, steps: int) -> list[int]:
    """Steps of random sizes, including none; returns the steps in which one native call and several calls differ."""
    layer = make_layer(context, seed, dtype, max_bytes=max_bytes)
    same, different = random.Random(seed), []
    torch.manual_seed(seed + 1 + context.rank)
    policies = torch.tensor([[TOP_K, 2.0, 0.0, 1.0], [TOP_K, 0.5, 0.0, 1.0], [1.0, 2.0, 0.0, 1.0]])
    for step in range(steps):
        largest = same.choice([1, 4, 300])
        tokens_per_rank = [same.choice([0, same.randint(0, largest)]) for _ in range(context.num_ranks)]
        tokens = tokens_per_rank[context.rank]
        x_TD, residual_TD = normal(tokens, HIDDEN, dtype=dtype), normal(tokens, HIDDEN, dtype=dtype)
        policy_T = torch.randint(0, len(policies), (tokens,))
        batch = Batch(
            *[torch.empty(0)] * 2,
            pages=(),
            num_decode=tokens // 2,
            dispatcher="symmetric",
            tokens_per_rank=tokens_per_rank,
            policies=StepPolicies(policy_T, policies[None]),
        )
        expected, expected_residual = layer(x_TD.clone(), residual_TD.clone(), batch)
        spread = layer.symmetric.step(tokens_per_rank, same.randint(1, max(1, *tokens_per_rank)))
        actual = layer.call(x_TD, tokens // 2, residual_TD, LayerPolicies(policy_T, policies), spread)
        if not (torch.equal(actual, expected) and torch.equal(residual_TD, expected_residual)):
            different.append(step)
    return different


def run_alone(context: RankContext, late_rank: int) -> str | None:
    """The ranks' errors when one of them stops before a block."""
    layer = make_layer(context, 0, torch.float32, timeout=0.3)
    if context.rank == late_rank:
        return None
    spread = layer.symmetric.step([4] * context.num_ranks, 4)
    with pytest.raises(TimeoutError) as error:
        layer.call(torch.randn(4, HIDDEN), 0, torch.randn(4, HIDDEN), spread=spread)
    return str(error.value)
