"""The native CPU kernels against their torch twins, on every instruction set that this machine has.

float32 sums differ from torch's in their order only; bfloat16 results are one rounding of such a sum, so they differ by
a unit in the last place (2^-8 of the value) plus what the twin's own roundings on the way leave.
"""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_runtime.kernels import reference, torch_attention, torch_ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.cpu import build, native
from moe_runtime.kernels.cpu.blocks import (
    AttentionBlock,
    DenseBlock,
    NextNorm,
    PackedExperts,
    PackedLinear,
    Router,
    SparseBlock,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
SIZES = [(1, 1), (64, 64), (70, 33), (130, 257), (192, 1030)]


@pytest.fixture(scope="module", params=build.supported_instruction_sets() or ["none"])
def kernels(request):
    if request.param == "none":
        pytest.skip("no instruction set for the native kernels")
    try:
        return native.load(request.param)
    except build.NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request, kernels):
    kernels.set_threads(request.param)


def assert_close(actual, expected, scale=1.0):
    """Within `scale` times what rounding leaves, relative to the largest value."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.numel():
        unit = 2e-6 if actual.dtype == torch.float32 else 2**-8
        limit = scale * unit * max(1e-3, float(expected.double().abs().max()))
        assert float((actual.double() - expected.double()).abs().max()) <= limit


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_packing_keeps_every_weight(kernels, dtype, size):
    weight = normal(*size, dtype=dtype)
    packed = PackedLinear.pack(kernels, weight)
    assert torch.equal(packed.unpack(), weight)
    in_pieces = PackedLinear(kernels, *size, dtype)
    cut = size[0] // 3
    in_pieces.load(cut, weight[cut:])
    in_pieces.load(0, weight[:cut])
    assert torch.equal(in_pieces.packed, packed.packed)


@DTYPES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_rows_of_a_packed_weight(kernels, dtype, size, rows):
    weight, index = normal(*size, dtype=dtype), torch.randint(size[0], (rows,))
    packed = PackedLinear.pack(kernels, weight)
    assert torch.equal(packed.take_rows(index), weight[index])
    with pytest.raises(ValueError, match=rf"index: \[{size[0]}\] is not allowed; it must be from 0 to {size[0] - 1}"):
        packed.take_rows(torch.tensor([size[0]]))


@DTYPES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 7, 203])
def test_linear(kernels, dtype, size, rows):
    weight, bias, x = normal(*size, dtype=dtype), normal(size[0], dtype=dtype), normal(rows, size[1], dtype=dtype)
    exact = x.double() @ weight.double().T
    assert_close(PackedLinear.pack(kernels, weight, bias)(x), (exact + bias.double()).to(dtype), scale=2)
    assert_close(PackedLinear.pack(kernels, weight)(x, float32=True), exact.float(), scale=5)


@DTYPES
@pytest.mark.parametrize("size", [(130, 257), (64, 2100)])
def test_a_row_has_the_same_bits_in_any_batch(kernels, dtype, size):
    linear, x = PackedLinear.pack(kernels, normal(*size, dtype=dtype)), normal(1000, size[1], dtype=dtype)
    kernels.set_threads(1)
    together = linear(x, float32=True)
    kernels.set_threads(2)
    for rows in range(1, 34):
        start = int(torch.randint(1000 - rows, ()))
        assert torch.equal(linear(x[start : start + rows], float32=True), together[start : start + rows])
    order = torch.randperm(1000)
    assert torch.equal(linear(x[order], float32=True), together[order])


@DTYPES
@pytest.mark.parametrize("shape", [(0, 24), (7, 24), (40, 1027), (7, 3, 25)])
def test_norms(kernels, dtype, shape):
    x, weight = normal(*shape, dtype=dtype) * 3, normal(shape[-1], dtype=dtype)
    assert_close(kernels.rms_norm(x, weight, 1e-5), torch_ops.rms_norm(x, weight, 1e-5))
    if x.ndim == 2:
        residual = normal(*shape, dtype=dtype) * 9
        normed, total = kernels.add_rms_norm(x, residual, weight, 1e-6)
        expected, expected_total = torch_ops.add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(total, expected_total)
        assert_close(normed, expected)


@DTYPES
@pytest.mark.parametrize("shape", [(0, 6), (5, 14), (33, 200)])
def test_silu_mul(kernels, dtype, shape):
    gate_up = normal(*shape, dtype=dtype) * 4
    assert_close(kernels.silu_mul(gate_up), torch_ops.silu_mul(gate_up), scale=2)


def test_silu_far_from_zero(kernels):
    gate_up = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 90.0, 1e4, float("nan"), *[1.0] * 7]])
    expected = torch_ops.silu_mul(gate_up)
    torch.testing.assert_close(kernels.silu_mul(gate_up), expected, rtol=1e-6, atol=1e-30, equal_nan=True)


GATES = [
    (8, {"top_k": 2, "scoring": "softmax", "normalize": True}),
    (7, {"top_k": 7, "scoring": "softmax", "normalize": False}),
    (64, {"top_k": 8, "scoring": "softmax", "normalize": True, "scale": 2.5}),
    (130, {"top_k": 6, "scoring": "sigmoid", "normalize": True, "bias": True}),
    (60, {"top_k": 4, "scoring": "sigmoid", "normalize": True, "bias": True, "num_groups": 6, "topk_groups": 2}),
    (16, {"top_k": 3, "scoring": "softmax", "normalize": False, "num_groups": 4, "topk_groups": 3}),
]


@pytest.mark.parametrize(("num_experts", "options"), GATES)
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_gate(kernels, num_experts, options, tokens):
    options = copy.copy(options)
    bias = torch.randn(num_experts) / 10 if options.pop("bias", False) else None
    logits = torch.randn(tokens, num_experts) * 2
    weights, experts = kernels.topk_gate(logits, correction_bias_E=bias, **options)
    expected_weights, expected = torch_ops.topk_gate(logits, correction_bias_E=bias, **options)
    assert torch.equal(experts, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)


def test_equal_choices_go_to_the_lower_expert(kernels):
    logits = torch.randint(0, 3, (200, 32)).float()
    for groups in (1, 4):
        options = {"top_k": 5, "scoring": "sigmoid", "normalize": False, "num_groups": groups, "topk_groups": 1}
        if groups > 1:
            options["topk_groups"] = 2
        assert torch.equal(kernels.topk_gate(logits, **options)[1], torch_ops.topk_gate(logits, **options)[1])


def test_experts_are_valid_and_different_where_logits_are_nan(kernels):
    logits = torch.full((3, 40), float("nan"))
    logits[1, ::2] = 1.0
    for scoring in ("softmax", "sigmoid"):
        _, experts = kernels.topk_gate(logits, top_k=8, scoring=scoring, normalize=True)
        assert all(len(set(row)) == 8 and min(row) >= 0 and max(row) < 40 for row in experts.tolist())


@pytest.mark.parametrize("size", [0, 1, 300])
def test_group_by_slot(kernels, size):
    slots = torch.randint(-1, 9, (size,))
    for actual, expected in zip(kernels.group_by_slot(slots, 9), torch_ops.group_by_slot(slots, 9), strict=True):
        assert torch.equal(actual, expected)


@DTYPES
@pytest.mark.parametrize("shape", [(0, 2, 8), (5, 1, 33), (40, 8, 200)])
def test_combine_equals_its_twin_bit_for_bit(kernels, dtype, shape):
    y, weights = normal(*shape, dtype=dtype), torch.rand(shape[:2])
    expected = torch_ops.combine_topk(y, weights)
    assert torch.equal(kernels.combine_topk(y, weights), expected)
    order = torch.randperm(shape[0] * shape[1])
    assert torch.equal(kernels.combine(y.flatten(0, 1)[order], order, weights), expected)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (2, 8192), (5, 20001), (33, 129)])
def test_argmax_is_the_first_largest(kernels, shape):
    x = torch.randn(shape).round(decimals=1)  # with equals
    expected = [row.tolist().index(max(row.tolist())) for row in x]
    assert kernels.argmax(x) == expected
    if x.numel():
        x[0] = -torch.inf
        assert kernels.argmax(x)[0] == 0


def experts_of(kernels, w13, w2):
    experts = PackedExperts(kernels, len(w2), w2.shape[1], w2.shape[2], w2.dtype)
    for slot in range(len(w2)):
        for part, rows in zip(("gate", "up", "down"), (*w13[slot].chunk(2), w2[slot]), strict=True):
            experts.load(slot, part, 0, rows)
        for actual, expected in zip(experts.unpack(slot), (*w13[slot].chunk(2), w2[slot]), strict=True):
            assert torch.equal(actual, expected)
    return experts


@DTYPES
@pytest.mark.parametrize("counts", [[0, 0], [1], [0, 5, 0, 12, 1], [250, 0, 1]])
@pytest.mark.parametrize(("hidden", "inner"), [(20, 13), (128, 64), (65, 131)])
def test_grouped_mlp(kernels, dtype, counts, hidden, inner):
    num_rows, slots = sum(counts), len(counts)
    w13, w2 = normal(slots, 2 * inner, hidden, dtype=dtype) / 4, normal(slots, hidden, inner, dtype=dtype) / 4
    x, row = normal(11, hidden, dtype=dtype), torch.randint(11, (num_rows,))
    experts, counts = experts_of(kernels, w13, w2), torch.tensor(counts)
    actual = experts(x, row, counts)
    assert_close(actual, reference.grouped_mlp(x, row, counts, w13, w2), scale=4)
    assert_close(actual, torch_ops.grouped_mlp(x, row, counts, w13, w2), scale=8)
    assert torch.equal(experts(x[row], None, counts), actual)


# Queries, context and page numbers of each sequence.
STEPS = [
    ([1], [1]),
    ([5], [5]),
    ([1, 1, 1], [1, 64, 150]),
    ([1, 200, 70], [65, 200, 300]),
    ([40, 1], [333, 7]),
]


def cache_and_meta(num_query, contexts, groups, head_size, dtype, page=16):
    pages = [-(-context // page) for context in contexts]
    order = (torch.randperm(sum(pages)) + 1).tolist()
    blocks = [[order.pop() for _ in range(count)] for count in pages]
    shape = (sum(pages) + 1, page, groups, head_size)
    meta = AttentionMetadata.build(num_query, contexts, blocks, torch.device("cpu"))
    return normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), meta, blocks


@DTYPES
@pytest.mark.parametrize("heads", [(4, 2, 64), (6, 1, 24), (3, 3, 17), (2, 1, 128), (2, 2, 80)])
@pytest.mark.parametrize(("num_query", "contexts"), STEPS)
@pytest.mark.parametrize("window", [None, 40])
def test_paged_attention(kernels, dtype, heads, num_query, contexts, window):
    num_heads, groups, head_size = heads
    k_cache, v_cache, meta, _ = cache_and_meta(num_query, contexts, groups, head_size, dtype)
    q = normal(sum(num_query), num_heads, head_size, dtype=dtype)
    options = {"scale": head_size**-0.5, "sliding_window": window}
    actual = kernels.paged_attention(q, k_cache, v_cache, meta, **options)
    expected = torch_attention.paged_attention(q, k_cache, v_cache, meta, **options)
    # The softmax weights are rounded to bfloat16 as well, which the twin does for more than one query only.
    assert_close(actual, expected, scale=3)


@DTYPES
@pytest.mark.parametrize("window", [None, 50])
def test_attention_has_the_same_bits_in_any_chunking_and_batch(kernels, dtype, window):
    """Whole prompts, random chunks, one token at a time, with what lies behind in the cache already or not."""
    page, contexts = 8, [201, 130]
    k_cache, v_cache, _, blocks = cache_and_meta([1, 1], contexts, 2, 32, dtype, page)
    queries = [normal(context, 6, 32, dtype=dtype) for context in contexts]
    options = {"scale": 0.2, "sliding_window": window}

    def attend(parts):
        meta = AttentionMetadata.build(
            [end - start for _, start, end in parts],
            [end for _, _, end in parts],
            [blocks[sequence] for sequence, _, _ in parts],
            torch.device("cpu"),
        )
        q = torch.cat([queries[sequence][start:end] for sequence, start, end in parts])
        return kernels.paged_attention(q, k_cache, v_cache, meta, **options)

    kernels.set_threads(1)
    whole = attend([(0, 0, 201)])
    kernels.set_threads(2)
    assert torch.equal(attend([(1, 0, 130), (0, 0, 201)])[130:], whole)
    for position in range(0, 201, 7):
        assert torch.equal(attend([(1, 5, 6), (0, position, position + 1)])[1:], whole[position : position + 1])
    start = 0
    while start < 201:
        end = min(201, start + int(torch.randint(1, 90, ())))
        assert torch.equal(attend([(0, start, end)]), whole[start:end])
        start = end
    # A query's result is a function of the keys that it sees: what comes later may change.
    for sequence_page in blocks[0][100 // page + 1 :]:
        k_cache[sequence_page], v_cache[sequence_page] = 7.0, -3.0
    assert torch.equal(attend([(0, 0, 100)]), whole[:100])


@DTYPES
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("head_dim", "rotated"), [(32, 32), (64, 20), (18, 6)])
@pytest.mark.parametrize("table", [True, False])
def test_attention_block(kernels, dtype, norms, head_dim, rotated, table):
    heads, groups, hidden, tokens = 6, 2, 50, 21
    qkv = normal((heads + 2 * groups) * head_dim, hidden, dtype=dtype) / 5
    bias, out_weight = normal(len(qkv), dtype=dtype), normal(hidden, heads * head_dim, dtype=dtype) / 8
    q_norm, k_norm = (normal(head_dim, dtype=dtype), normal(head_dim, dtype=dtype)) if norms else (None, None)
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
        "q_norm_d": q_norm,
        "k_norm_d": k_norm,
        "eps": 1e-6,
    }
    weights = PackedLinear.pack(kernels, qkv, bias), PackedLinear.pack(kernels, out_weight)
    block = AttentionBlock(kernels, *weights, **options)
    rows = torch.tensor(positions)
    step = native.Step(meta, slots, cos, sin, rows) if table else native.Step(meta, slots, cos[rows], sin[rows])
    own_k, own_v = k_cache.clone(), v_cache.clone()
    actual = block(x, step, own_k, own_v)

    projected = torch.nn.functional.linear(x, qkv, bias).view(tokens, -1, head_dim)
    q, k, v = projected.split((heads, groups, groups), dim=1)
    if norms:
        q, k = torch_ops.rms_norm(q, q_norm, 1e-6), torch_ops.rms_norm(k, k_norm, 1e-6)
    q, k = torch_ops.apply_rotary(q, k, cos[rows], sin[rows])
    torch_attention.store_kv(k, v, k_cache, v_cache, slots)
    attended = torch_attention.paged_attention(q, k_cache, v_cache, meta, scale=head_dim**-0.5, sliding_window=None)
    # A projection's last bit may differ, and norms and scores pass it on.
    assert_close(own_k, k_cache, scale=4)
    assert_close(own_v, v_cache)
    assert_close(actual, torch.nn.functional.linear(attended.flatten(1), out_weight), scale=8)
    next_norm, residual = NextNorm(normal(hidden, dtype=dtype), 1e-5), normal(tokens, hidden, dtype=dtype)
    total = residual.clone()
    normed = AttentionBlock(kernels, *weights, **options, next_norm=next_norm)(x, step, own_k, own_v, total)
    for fused, plain in zip(
        (normed, total), kernels.add_rms_norm(actual, residual, next_norm.weight_D, 1e-5), strict=True
    ):
        assert torch.equal(fused, plain)
    untouched = torch.ones(k_cache.shape[:2], dtype=torch.bool)
    untouched.view(-1)[slots] = False
    assert torch.equal(own_k[untouched], k_cache[untouched])


@DTYPES
@pytest.mark.parametrize(("head_dim", "rotated"), [(32, 32), (64, 20), (18, 6)])
def test_keys_and_values_reach_the_cache_as_the_twin_leaves_them(kernels, dtype, head_dim, rotated):
    """Through a projection that copies, so that nothing is summed: rotary embedding and store are equal bit for bit."""
    size, tokens = 4 * head_dim, 30
    block = AttentionBlock(
        kernels,
        PackedLinear.pack(kernels, torch.eye(size).to(dtype)),
        PackedLinear.pack(kernels, torch.eye(size, 2 * head_dim).to(dtype)),
        num_heads=2,
        num_kv_heads=1,
        head_dim=head_dim,
        scale=1.0,
        sliding_window=None,
        q_norm_d=None,
        k_norm_d=None,
        eps=1e-6,
    )
    k_cache, v_cache, meta, blocks = cache_and_meta([tokens], [tokens], 1, head_dim, dtype)
    slots = torch.tensor([blocks[0][position // 16] * 16 + position % 16 for position in range(tokens)])
    x, cos, sin = normal(tokens, size, dtype=dtype), torch.randn(tokens, rotated), torch.randn(tokens, rotated)
    own_k, own_v = k_cache.clone(), v_cache.clone()
    block(x, native.Step(meta, slots, cos, sin), own_k, own_v)

    q, k, v = x.view(tokens, 4, head_dim).split((2, 1, 1), dim=1)
    torch_attention.store_kv(torch_ops.apply_rotary(q, k, cos, sin)[1], v, k_cache, v_cache, slots)
    assert torch.equal(own_k, k_cache) and torch.equal(own_v, v_cache)


def sparse_block(kernels, dtype, router_dtype, shared, num_experts=12, hidden=72, inner=40):
    gate = native.gate_config(num_experts, top_k=3, scoring="softmax", normalize=True)
    weight = normal(num_experts, hidden, dtype=router_dtype) / 8
    w13 = normal(num_experts, 2 * inner, hidden, dtype=dtype) / 8
    w2 = normal(num_experts, hidden, inner, dtype=dtype) / 8
    slot_E, counts = torch.randperm(num_experts), torch.zeros(2, 3, num_experts, dtype=torch.int64)
    router = Router(kernels, gate, weight, slot_E, counts[:, 1])
    shared_weights = (normal(1, 34, hidden, dtype=dtype) / 8, normal(1, hidden, 17, dtype=dtype) / 8)
    block = SparseBlock(router, experts_of(kernels, w13, w2), experts_of(kernels, *shared_weights) if shared else None)
    return block, weight, w13, w2, slot_E, counts, shared_weights if shared else None


@DTYPES
@pytest.mark.parametrize("float32_router", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_sparse_block(kernels, dtype, float32_router, shared, tokens):
    router_dtype = torch.float32 if float32_router else dtype
    block, weight, w13, w2, slot_E, counts, shared_weights = sparse_block(kernels, dtype, router_dtype, shared)
    x, num_decode = normal(tokens, w2.shape[1], dtype=dtype), tokens // 3
    actual = block(x, num_decode)

    # The twin's own choice could fall otherwise where two logits are a rounding apart.
    weights, experts = block.router(x, num_decode)
    logits = torch.nn.functional.linear(x.to(router_dtype), weight).float()
    expected_weights, _ = torch_ops.topk_gate(logits, top_k=3, scoring="softmax", normalize=True)
    # A logit of a bfloat16 router may be one rounding off, 2^-8 of it, and so may the weight's logarithm.
    assert_close(weights, expected_weights, scale=10 if router_dtype == torch.float32 else 5000)
    order, rows_per_slot = torch_ops.group_by_slot(slot_E[experts].flatten(), len(slot_E))
    y = torch.empty(tokens * 3, x.shape[1], dtype=dtype)
    y[order] = torch_ops.grouped_mlp(x, order // 3, rows_per_slot, w13, w2)
    expected = torch_ops.combine_topk(y.view(tokens, 3, x.shape[1]), weights)
    if shared_weights:
        expected = expected + torch_ops.grouped_mlp(x, None, torch.tensor([tokens]), *shared_weights)
    assert_close(actual, expected, scale=8)

    expected_counts = torch.zeros_like(counts)  # counted by both calls
    expected_counts[1, 1] = 2 * torch.bincount(experts[:num_decode].flatten(), minlength=len(slot_E))
    expected_counts[0, 1] = 2 * torch.bincount(experts[num_decode:].flatten(), minlength=len(slot_E))
    assert torch.equal(counts, expected_counts)


@DTYPES
def test_a_token_leaves_the_sparse_block_with_the_same_bits_in_any_batch(kernels, dtype):
    block, *_ = sparse_block(kernels, dtype, torch.float32, shared=True)
    x = normal(300, block.experts.hidden_size, dtype=dtype)
    kernels.set_threads(1)
    together = block(x, 0)
    kernels.set_threads(2)
    for rows in [*range(1, 34), 299]:
        start = int(torch.randint(300 - rows + 1, ()))
        assert torch.equal(block(x[start : start + rows], rows), together[start : start + rows])


@DTYPES
def test_blocks_with_the_norm_behind_them(kernels, dtype):
    block, *_ = sparse_block(kernels, dtype, torch.float32, shared=False)
    x, residual = normal(20, 72, dtype=dtype), normal(20, 72, dtype=dtype)
    norm = NextNorm(normal(72, dtype=dtype), 1e-6)
    w13, w2 = normal(1, 60, 72, dtype=dtype) / 8, normal(1, 72, 30, dtype=dtype) / 8
    mlp = experts_of(kernels, w13, w2)
    dense = DenseBlock(mlp)(x)
    assert torch.equal(dense, mlp(x, None, torch.tensor([20])))
    with_norm = (SparseBlock(block.router, block.experts, None, norm), (0,)), (DenseBlock(mlp, norm), ())
    for (fused, arguments), plain in zip(with_norm, (block(x, 0), dense), strict=True):
        total = residual.clone()
        normed = fused(x, *arguments, total)
        expected, expected_total = kernels.add_rms_norm(plain, residual, norm.weight_D, norm.eps)
        assert torch.equal(normed, expected) and torch.equal(total, expected_total)


def test_more_threads_than_cores_and_several_callers(kernels):
    """The pool is resized and driven from several Python threads at once; every result keeps its bits."""
    linear, x = PackedLinear.pack(kernels, normal(640, 96)), normal(50, 96)
    expected = linear(x)
    for count in (7, 1, 3, 8):
        kernels.set_threads(count)
        assert kernels.num_threads == count
        with ThreadPoolExecutor(3) as callers:
            for result in callers.map(lambda _: [linear(x) for _ in range(30)], range(3)):
                assert all(torch.equal(one, expected) for one in result)


def test_workers_that_sleep_are_woken(kernels):
    linear, x = PackedLinear.pack(kernels, normal(640, 96)), normal(50, 96)
    expected = linear(x)
    for _ in range(5):
        time.sleep(0.01)
        assert torch.equal(linear(x), expected)


def test_wrong_operands_are_refused(kernels):
    with pytest.raises(ValueError, match=r"operand: strides .* must be contiguous"):
        kernels.rms_norm(torch.randn(4, 6).T, torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match="float16 is not allowed"):
        kernels.rms_norm(torch.randn(4, 6).half(), torch.ones(6).half(), 1e-6)
    with pytest.raises(ValueError, match="top_k: 9 is not allowed"):
        kernels.topk_gate(torch.randn(2, 8), top_k=9, scoring="softmax", normalize=True)
    with pytest.raises(ValueError, match="num_threads: 0 is not allowed"):
        kernels.set_threads(0)
