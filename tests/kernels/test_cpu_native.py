"""The native CPU kernels against their torch twins, on every instruction set that this machine has.

float32 sums differ from torch's only in their order. bfloat16 results are one rounding of such a sum. So they differ by
a unit in the last place (2^-8 of the value) plus the error of the twin's own intermediate roundings.
"""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_cases import DTYPES, assert_close, experts_of, normal

from moe_runtime.kernels import reference, torch_ops
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear
from moe_runtime.kernels.swiglu import SwiGLU
from moe_runtime.types.weight_format import PANEL

pytestmark = pytest.mark.usefixtures("threads")
SIZES = [(1, 1), (64, 64), (70, 33), (130, 257), (192, 1030)]


@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_packing_keeps_every_weight(kernels, dtype, size):
    weight = normal(*size, dtype=dtype)
    packed = PackedLinear.pack(kernels, weight)
    assert torch.equal(packed.unpack(), weight)
    in_pieces = PackedLinear(kernels, *size, dtype)
    cut = size[0] // 2 // PANEL * PANEL
    in_pieces.put(cut, weight[cut:])
    in_pieces.put(0, weight[:cut])
    for actual, expected in zip(in_pieces.matrix.stored(0), packed.matrix.stored(0), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("size", [(1, 1), (70, 33), (192, 1030)])
@pytest.mark.parametrize("share", [0.001, 0.2, 1.0])
def test_any_bits_of_a_bf16_weight_are_kept(kernels, size, share):
    weight = normal(*size, dtype=torch.bfloat16)
    strange = torch.randint(-(1 << 15), 1 << 15, size, dtype=torch.int16)  # infinite and NaN as well
    bits = torch.where(torch.rand(size) < share, strange, weight.view(torch.int16))
    packed = PackedLinear.pack(kernels, bits.view(torch.bfloat16))
    assert torch.equal(packed.unpack().view(torch.int16), bits)
    index = torch.randint(size[0], (5,))
    assert torch.equal(packed.take_rows(index).view(torch.int16), bits[index])
    packed.put(0, weight)  # in the place of the other
    assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize("rows", [1, 6, 7, 40])
def test_products_with_bf16_weights_of_any_size(kernels, rows):
    """High bytes beyond those that the codes have, in every step and in few."""
    sizes = torch.tensor([2.0**-60, 2.0**-30, 1.0, 2.0**20])
    for share in (0.0005, 0.5):
        scale = torch.where(torch.rand(130, 514) < share, sizes[torch.randint(4, (130, 514))], torch.ones(()))
        weight, x = (normal(130, 514) * scale).bfloat16(), normal(rows, 514, dtype=torch.bfloat16)
        exact = x.double() @ weight.double().T
        assert_close(PackedLinear.pack(kernels, weight)(x, float32=True), exact.float(), scale=5)


def test_other_dtypes_are_refused_before_anything_is_packed(kernels):
    with pytest.raises(ValueError, match=r"dtype: torch\.float16 is not allowed"):
        PackedLinear(kernels, 64, 64, torch.float16)
    with pytest.raises(ValueError, match=r"dtype: torch\.float64 is not allowed"):
        PackedExperts(kernels, 1, 64, 64, torch.float64)


@DTYPES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_rows_of_a_packed_weight(kernels, dtype, size, rows):
    weight, index = normal(*size, dtype=dtype), torch.randint(size[0], (rows,))
    packed = PackedLinear.pack(kernels, weight)
    assert torch.equal(packed.take_rows(index), weight[index])
    with pytest.raises(ValueError, match=rf"index: {size[0]} is not allowed; it must be from 0 to {size[0] - 1}"):
        packed.take_rows(torch.tensor([size[0]]))


@DTYPES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 7, 203])
def test_linear(kernels, dtype, size, rows):
    weight, bias, x = normal(*size, dtype=dtype), normal(size[0], dtype=dtype), normal(rows, size[1], dtype=dtype)
    exact = x.double() @ weight.double().T
    expected = (exact + bias.double()).to(dtype)
    # A product and a bias may cancel, and their rounding stays.
    terms, left = (float(each.abs().max()) if rows else 1.0 for each in (exact.abs() + bias.abs(), expected))
    assert_close(PackedLinear.pack(kernels, weight, bias)(x), expected, scale=2 * terms / max(left, 1e-3))
    assert_close(PackedLinear.pack(kernels, weight)(x, float32=True), exact.float(), scale=5)


@DTYPES
@pytest.mark.parametrize("size", [(130, 257), (64, 2100)])
@pytest.mark.parametrize("scale", [1.0, 1e-19, 1e-38])
def test_a_row_has_the_same_bits_in_any_batch(kernels, dtype, size, scale):
    """Also where products, sums or the numbers themselves are below the normal ones."""
    linear = PackedLinear.pack(kernels, normal(*size, dtype=dtype) * min(1.0, scale * 1e19))
    x = normal(1000, size[1], dtype=dtype) * scale
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
        scaled = kernels.add_rms_norm(x, residual, weight, 1e-6, 0.22)
        for actual, twin in zip(scaled, torch_ops.add_rms_norm(x, residual, weight, 1e-6, 0.22), strict=True):
            assert_close(actual, twin, scale=4)  # the sum's last bit may differ, and the norm passes it on
        kernels.add_rms_norm(x, residual, weight, 1e-6, in_place=True)
        assert torch.equal(x, normed) and torch.equal(residual, total)


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
    (
        16,
        {
            "top_k": 3,
            "scoring": "softmax",
            "normalize": False,
            "num_groups": 8,
            "topk_groups": 3,
            "groups_by_best": True,
        },
    ),
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
    assert torch_ops.argmax(x) == expected


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [1, 7, 8192, 20001])
def test_argmax_of_a_row_that_is_not_finite_is_minus_one(kernels, bad, size):
    x = torch.randn(3, size)
    x[1, torch.randint(size, ())] = bad
    best = x.argmax(dim=1).tolist()
    assert kernels.argmax(x) == torch_ops.argmax(x) == [best[0], -1, best[2]]


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
    room = torch.full_like(actual, torch.nan)
    assert experts(x, row, counts, room) is room and torch.equal(room, actual)


@DTYPES
@pytest.mark.parametrize(("counts", "hidden", "inner"), [([3, 0, 40, 1], 70, 90), ([5], 64, 33), ([0, 0], 8, 8)])
def test_grouped_mlp_with_biases_and_a_clamped_activation(kernels, dtype, counts, hidden, inner):
    num_rows, slots, swiglu = sum(counts), len(counts), SwiGLU(1.702, 0.7, 1.0)
    w13, w2 = normal(slots, 2 * inner, hidden, dtype=dtype) / 4, normal(slots, hidden, inner, dtype=dtype) / 4
    b13, b2 = normal(slots, 2 * inner, dtype=dtype), normal(slots, hidden, dtype=dtype)
    x, row = normal(11, hidden, dtype=dtype), torch.randint(11, (num_rows,))
    experts = experts_of(kernels, w13, w2, swiglu=swiglu, has_bias=True)
    for slot in range(slots):
        for part, bias in zip(("gate_bias", "up_bias", "down_bias"), (*b13[slot].chunk(2), b2[slot]), strict=True):
            experts.put(slot, part, 0, bias)
    counts = torch.tensor(counts)
    actual = experts(x, row, counts)
    options = {"b13_SG": b13, "b2_SD": b2, "swiglu": swiglu}
    assert_close(actual, reference.grouped_mlp(x, row, counts, w13, w2, **options), scale=4)
    assert torch.equal(experts(x[row], None, counts), actual)
    assert len(experts.stored(0)) == 6


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
