"""Operands of the native CPU kernels, and the tolerance between a kernel and its torch twin."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.cpu.blocks import AttentionCall
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def assert_close(actual, expected, scale=1.0):
    """Assert a difference within `scale` times the rounding error, relative to the largest value."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.numel():
        unit = 2e-6 if actual.dtype == torch.float32 else 2**-8
        limit = scale * unit * max(1e-3, float(expected.double().abs().max()))
        assert float((actual.double() - expected.double()).abs().max()) <= limit


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def experts_of(kernels, w13, w2, gate_D=None, **options):
    experts = PackedExperts(kernels, len(w2), w2.shape[1], w2.shape[2], w2.dtype, gate_D, **options)
    for slot in range(len(w2)):
        for part, rows in zip(("gate", "up", "down"), (*w13[slot].chunk(2), w2[slot]), strict=True):
            experts.put(slot, part, 0, rows)
        for actual, expected in zip(experts.unpack(slot), (*w13[slot].chunk(2), w2[slot]), strict=True):
            assert torch.equal(actual, expected)
    return experts


def copying_attention(kernels, projection, output, num_heads, head_dim):
    """Attention with one key/value head between matrices that copy, so that nothing is summed."""
    return AttentionCall(
        kernels,
        PackedLinear.pack(kernels, projection),
        PackedLinear.pack(kernels, output),
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=head_dim,
        scale=1.0,
        sliding_window=None,
        qk_norm=None,
        q_norm=None,
        k_norm=None,
        eps=1e-6,
    )


def cache_and_meta(num_query, contexts, groups, head_size, dtype, page=16):
    pages = [-(-context // page) for context in contexts]
    order = (torch.randperm(sum(pages)) + 1).tolist()
    blocks = [[order.pop() for _ in range(count)] for count in pages]
    shape = (sum(pages) + 1, page, groups, head_size)
    meta = AttentionMetadata.build(num_query, contexts, blocks, torch.device("cpu"))
    return normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), meta, blocks
