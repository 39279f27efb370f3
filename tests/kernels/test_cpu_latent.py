"""Latent attention, one native call, against the same operations in torch; the attention itself with values inside the
keys, values of another size, and sinks."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import DTYPES, assert_close, cache_and_meta, normal

from moe_runtime.kernels import reference, torch_attention, torch_ops
from moe_runtime.kernels.cpu.blocks import NextNorm
from moe_runtime.kernels.cpu.latent import LatentCall
from moe_runtime.kernels.cpu.native_step import NativeStep
from moe_runtime.kernels.cpu.packed import PackedLinear, PackedMatrices

pytestmark = pytest.mark.usefixtures("threads")

HIDDEN = 50


def packed_heads(kernels, weights):
    packed = PackedMatrices(kernels, weights.dtype, weights.shape[1], weights.shape[2], len(weights))
    for head, weight in enumerate(weights):
        packed.put(head, 0, weight)
    return packed


@DTYPES
@pytest.mark.parametrize("rank", [None, 20])
@pytest.mark.parametrize(("heads", "latent", "nope", "rope", "value"), [(6, 64, 32, 16, 32), (5, 27, 11, 6, 13)])
@pytest.mark.parametrize("scaled", [True, False])
def test_latent_block(kernels, dtype, rank, heads, latent, nope, rope, value, scaled):
    tokens, key_size, query_size = 21, latent + rope, heads * (nope + rope)
    down = normal((rank or query_size) + key_size, HIDDEN, dtype=dtype) / 5
    down_bias, up = normal(len(down), dtype=dtype), normal(query_size, rank or 1, dtype=dtype) / 5
    key, values = normal(heads, latent, nope, dtype=dtype) / 4, normal(heads, value, latent, dtype=dtype) / 6
    out_weight = normal(HIDDEN, heads * value, dtype=dtype) / 8
    query_norm, latent_norm = normal(rank or 1, dtype=dtype), normal(latent, dtype=dtype)
    cache, _, meta, blocks = cache_and_meta([1, tokens - 1], [40, 33], 1, key_size, dtype)
    positions = [39, *range(33 - tokens + 1, 33)]
    slots = torch.tensor([blocks[row > 0][place // 16] * 16 + place % 16 for row, place in enumerate(positions)])
    angles = torch.rand(tokens, rope // 2) * 6
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    query_scale = torch.rand(tokens) + 0.5 if scaled else None
    x = normal(tokens, HIDDEN, dtype=dtype)

    weights = (
        PackedLinear.pack(kernels, down, down_bias),
        PackedLinear.pack(kernels, up) if rank else None,
        packed_heads(kernels, key),
        packed_heads(kernels, values),
        PackedLinear.pack(kernels, out_weight),
    )
    options = {"query_norm": query_norm, "latent_norm": latent_norm, "rope_size": rope, "scale": 0.2, "eps": 1e-6}
    block = LatentCall(kernels, *weights, **options)
    step = NativeStep(meta, slots, cos, sin, query_scale_T=query_scale)
    own = cache.clone()
    actual = block(x, step, own)

    parts = torch.nn.functional.linear(x, down, down_bias).split((rank or query_size, latent, rope), dim=1)
    queries = parts[0]
    if rank:
        queries = torch.nn.functional.linear(torch_ops.rms_norm(queries, query_norm, 1e-6), up)
    plain, turned = queries.view(tokens, heads, -1).split((nope, rope), dim=2)
    turned, shared = torch_ops.apply_rotary(turned, parts[2][:, None], cos, sin)
    row = torch.cat((torch_ops.rms_norm(parts[1], latent_norm, 1e-6)[:, None], shared), dim=2)
    cache.flatten(0, 1)[slots] = row
    q = torch.cat((torch_ops.head_products(plain, key), turned), dim=2)
    if scaled:
        q = (q.float() * query_scale[:, None, None]).to(dtype)
    summed = torch_attention.paged_attention(q, cache, cache[..., :latent], meta, scale=0.2, sliding_window=None)
    attended = torch_ops.head_products(summed, values)
    # A projection's last bit may differ, and norms, products and scores pass it on.
    assert_close(own, cache, scale=4)
    assert_close(actual, torch.nn.functional.linear(attended.flatten(1), out_weight), scale=12)

    next_norm, residual = NextNorm(normal(HIDDEN, dtype=dtype), 1e-5, 0.3), normal(tokens, HIDDEN, dtype=dtype)
    total = residual.clone()
    fused = LatentCall(kernels, *weights, **options, next_norm=next_norm)(x, step, own, total), total
    assert all(map(torch.equal, fused, kernels.add_rms_norm(actual, residual, next_norm.weight_D, 1e-5, 0.3)))
    kept = block(x, step, own, in_place=True)
    assert kept is x and torch.equal(x, actual)


@DTYPES
@pytest.mark.parametrize(("groups", "key_size", "value_size"), [(1, 80, 64), (2, 24, 16), (2, 64, 64), (1, 35, 27)])
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("window", [None, 9])
def test_attention_with_sinks_and_values_of_another_size(kernels, dtype, groups, key_size, value_size, sinks, window):
    queries, contexts, heads = [1, 1, 7, 30], [1300, 40, 60, 30], 6
    keys, values, meta, _ = cache_and_meta(queries, contexts, groups, key_size, dtype)
    inside = groups == 1
    values = keys[..., :value_size] if inside else values[..., :value_size].contiguous()
    q = normal(sum(queries), heads, key_size, dtype=dtype)
    options = {"scale": 0.2, "sliding_window": window, "sinks_H": torch.randn(heads) * 4 if sinks else None}
    actual = kernels.paged_attention(q, keys, values, meta, **options)
    assert_close(actual, reference.paged_attention(q, keys, values, meta, **options), scale=4)
    if sinks:
        heavy = kernels.paged_attention(q, keys, values, meta, **options | {"sinks_H": torch.full((heads,), 1e4)})
        assert torch.isfinite(heavy).all() and float(heavy.abs().max()) < 1e-3, "a sink may take all the weight"
