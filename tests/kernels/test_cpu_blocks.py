"""The blocks of a layer, one native call each, against the same operations in torch."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import DTYPES, assert_close, cache_and_meta, copying_attention, experts_of, normal

from moe_runtime.kernels import torch_attention, torch_ops
from moe_runtime.kernels.cpu import native
from moe_runtime.kernels.cpu.blocks import AttentionCall, DenseCall, GateCall, NextNorm, SparseCall
from moe_runtime.kernels.cpu.native_step import NativeStep
from moe_runtime.kernels.cpu.packed import PackedLinear

pytestmark = pytest.mark.usefixtures("threads")


@DTYPES
@pytest.mark.parametrize("norm", [None, "head", "token", "rotated_head"])
@pytest.mark.parametrize(("head_dim", "rotated"), [(32, 32), (64, 20), (18, 6)])
@pytest.mark.parametrize("table", [True, False])
def test_attention_block(kernels, dtype, norm, head_dim, rotated, table):
    heads, groups, hidden, tokens = 6, 2, 50, 21
    qkv = normal((heads + 2 * groups) * head_dim, hidden, dtype=dtype) / 5
    bias, out_weight = normal(len(qkv), dtype=dtype), normal(hidden, heads * head_dim, dtype=dtype) / 8
    norm_sizes = (heads * head_dim, groups * head_dim) if norm == "token" else (head_dim, head_dim)
    q_norm, k_norm = (normal(size, dtype=dtype) if norm else None for size in norm_sizes)
    k_cache, v_cache, meta, blocks = cache_and_meta([1, tokens - 1], [40, 33], groups, head_dim, dtype)
    positions = [39, *range(33 - tokens + 1, 33)]
    slots = torch.tensor(
        [blocks[0 if row == 0 else 1][position // 16] * 16 + position % 16 for row, position in enumerate(positions)]
    )
    angles = torch.rand(50, rotated // 2) * 6
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    x = normal(tokens, hidden, dtype=dtype)

    options = {
        "num_heads": heads,
        "num_kv_heads": groups,
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "sliding_window": None,
        "qk_norm": norm,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "eps": 1e-6,
    }
    weights = PackedLinear.pack(kernels, qkv, bias), PackedLinear.pack(kernels, out_weight)
    block = AttentionCall(kernels, *weights, **options)
    rows = torch.tensor(positions)
    step = NativeStep(meta, slots, cos, sin, rows) if table else NativeStep(meta, slots, cos[rows], sin[rows])
    own_k, own_v = k_cache.clone(), v_cache.clone()
    actual = block(x, step, own_k, own_v)

    def normed(*heads):
        return [torch_ops.rms_norm(x, weight, 1e-6) for x, weight in zip(heads, (q_norm, k_norm), strict=True)]

    projected = torch.nn.functional.linear(x, qkv, bias)
    q, k, v = projected.split([count * head_dim for count in (heads, groups, groups)], dim=1)
    q, k = normed(q, k) if norm == "token" else (q, k)
    q, k, v = (part.view(tokens, -1, head_dim) for part in (q, k, v.contiguous()))
    q, k = normed(q, k) if norm == "head" else (q, k)
    q, k = torch_ops.apply_rotary(q, k, cos[rows], sin[rows])
    q, k = normed(q, k) if norm == "rotated_head" else (q, k)
    torch_attention.store_kv(k, v, k_cache, v_cache, slots)
    attended = torch_attention.paged_attention(q, k_cache, v_cache, meta, scale=head_dim**-0.5, sliding_window=None)
    # A projection's last bit may differ, and norms and scores pass it on.
    assert_close(own_k, k_cache, scale=4)
    assert_close(own_v, v_cache)
    assert_close(actual, torch.nn.functional.linear(attended.flatten(1), out_weight), scale=8)
    next_norm, residual = NextNorm(normal(hidden, dtype=dtype), 1e-5, 0.3), normal(tokens, hidden, dtype=dtype)
    total = residual.clone()
    fused = AttentionCall(kernels, *weights, **options, next_norm=next_norm)(x, step, own_k, own_v, total), total
    plain = kernels.add_rms_norm(actual, residual, next_norm.weight_D, 1e-5, 0.3)
    assert all(map(torch.equal, fused, plain))
    kept = block(x, step, own_k, own_v, in_place=True)
    assert kept is x and torch.equal(x, actual)
    untouched = torch.ones(k_cache.shape[:2], dtype=torch.bool)
    untouched.view(-1)[slots] = False
    assert torch.equal(own_k[untouched], k_cache[untouched])


@DTYPES
@pytest.mark.parametrize(("head_dim", "rotated"), [(32, 32), (64, 20), (18, 6)])
def test_keys_and_values_reach_the_cache_as_the_twin_leaves_them(kernels, dtype, head_dim, rotated):
    """Through a projection that copies, so that nothing is summed: rotary embedding and store are equal bit for bit."""
    size, tokens = 4 * head_dim, 30
    output = torch.eye(size, 2 * head_dim).to(dtype)
    block = copying_attention(kernels, torch.eye(size).to(dtype), output, 2, head_dim)
    k_cache, v_cache, meta, blocks = cache_and_meta([tokens], [tokens], 1, head_dim, dtype)
    slots = torch.tensor([blocks[0][position // 16] * 16 + position % 16 for position in range(tokens)])
    x, cos, sin = normal(tokens, size, dtype=dtype), torch.randn(tokens, rotated), torch.randn(tokens, rotated)
    own_k, own_v = k_cache.clone(), v_cache.clone()
    block(x, NativeStep(meta, slots, cos, sin), own_k, own_v)

    q, k, v = x.view(tokens, 4, head_dim).split((2, 1, 1), dim=1)
    torch_attention.store_kv(torch_ops.apply_rotary(q, k, cos, sin)[1], v, k_cache, v_cache, slots)
    assert torch.equal(own_k, k_cache) and torch.equal(own_v, v_cache)


def sparse_block(kernels, dtype, gate_dtype, shared, num_experts=12, hidden=72, inner=40):
    """`shared` is False, True or "gated"."""
    gate = native.gate_config(num_experts, top_k=3, scoring="softmax", normalize=True)
    weight = normal(num_experts, hidden, dtype=gate_dtype) / 8
    w13 = normal(num_experts, 2 * inner, hidden, dtype=dtype) / 8
    w2 = normal(num_experts, hidden, inner, dtype=dtype) / 8
    slot_E, counts = torch.randperm(num_experts), torch.zeros(2, 3, num_experts, dtype=torch.int64)
    gate = GateCall(kernels, gate, weight, counts[:, 1])
    shared_weights = (normal(1, 34, hidden, dtype=dtype) / 8, normal(1, hidden, 17, dtype=dtype) / 8)
    row_gate = normal(hidden, dtype=dtype) / 8 if shared == "gated" else None
    shared_experts = experts_of(kernels, *shared_weights, row_gate) if shared else None
    block = SparseCall(gate, slot_E[:, None], experts_of(kernels, w13, w2), shared_experts)
    return block, weight, w13, w2, slot_E, counts, shared_weights if shared else None


@DTYPES
@pytest.mark.parametrize("float32_router", [True, False])
@pytest.mark.parametrize("shared", [True, False, "gated"])
@pytest.mark.parametrize("tokens", [0, 1, 30, 1100])  # the last in three parts
def test_sparse_block(kernels, dtype, float32_router, shared, tokens):
    gate_dtype = torch.float32 if float32_router else dtype
    block, weight, w13, w2, slot_E, counts, shared_weights = sparse_block(kernels, dtype, gate_dtype, shared)
    x, num_decode = normal(tokens, w2.shape[1], dtype=dtype), tokens // 3
    actual = block(x, num_decode)

    # The twin's own choice could fall otherwise where two logits are a rounding apart.
    weights, experts, _ = block.gate(x, num_decode)
    logits = torch.nn.functional.linear(x.to(gate_dtype), weight).float()
    expected_weights, _ = torch_ops.topk_gate(logits, top_k=3, scoring="softmax", normalize=True)
    # A logit of a bfloat16 gate may be one rounding off, 2^-8 of it, and so may the weight's logarithm.
    assert_close(weights, expected_weights, scale=10 if gate_dtype == torch.float32 else 5000)
    order, rows_per_slot = torch_ops.group_by_slot(slot_E[experts].flatten(), len(slot_E))
    y = torch.empty(tokens * 3, x.shape[1], dtype=dtype)
    y[order] = torch_ops.grouped_mlp(x, order // 3, rows_per_slot, w13, w2)
    expected = torch_ops.combine_topk(y.view(tokens, 3, x.shape[1]), weights)
    if shared_weights:
        rows = torch_ops.grouped_mlp(x, None, torch.tensor([tokens]), *shared_weights)
        expected = expected + (torch_ops.scale_rows(rows, x, block.shared.gate_D) if shared == "gated" else rows)
    assert_close(actual, expected, scale=8)

    expected_counts = torch.zeros_like(counts)  # counted by both calls
    expected_counts[1, 1] = 2 * torch.bincount(experts[:num_decode].flatten(), minlength=len(slot_E))
    expected_counts[0, 1] = 2 * torch.bincount(experts[num_decode:].flatten(), minlength=len(slot_E))
    assert torch.equal(counts, expected_counts)


@DTYPES
def test_a_token_leaves_the_sparse_block_with_the_same_bits_in_any_batch(kernels, dtype):
    block, *_ = sparse_block(kernels, dtype, torch.float32, shared="gated")
    x = normal(1100, block.experts.hidden_size, dtype=dtype)  # takes three parts
    kernels.set_threads(1)
    together = block(x, 0)
    kernels.set_threads(2)
    for rows in [*range(1, 34), 600, 1099]:
        start = int(torch.randint(1100 - rows + 1, ()))
        assert torch.equal(block(x[start : start + rows], rows), together[start : start + rows])


@DTYPES
def test_blocks_with_the_norm_behind_them(kernels, dtype):
    block, _, _, _, slot_E, *_ = sparse_block(kernels, dtype, torch.float32, shared=False)
    x, residual = normal(20, 72, dtype=dtype), normal(20, 72, dtype=dtype)
    norm = NextNorm(normal(72, dtype=dtype), 1e-6)
    w13, w2 = normal(1, 60, 72, dtype=dtype) / 8, normal(1, 72, 30, dtype=dtype) / 8
    mlp = experts_of(kernels, w13, w2)
    dense = DenseCall(mlp)(x)
    assert torch.equal(dense, mlp(x, None, torch.tensor([20])))
    sparse = SparseCall(block.gate, slot_E[:, None], block.experts, None, norm)
    with_norm = (sparse, (0,)), (DenseCall(mlp, norm), ())
    for (fused, arguments), plain in zip(with_norm, (block(x, 0), dense), strict=True):
        total = residual.clone()
        normed = fused(x, *arguments, total)
        expected, expected_total = kernels.add_rms_norm(plain, residual, norm.weight_D, norm.eps)
        assert torch.equal(normed, expected) and torch.equal(total, expected_total)
