"""Quantised matrices in slots, and the products in torch that take them."""

import pytest
import torch
from quantized_matrices import FORMATS, name_of, random_matrix, random_slots
from torch.nn import functional as F

from moe_runtime.kernels import invariant_ops, ops, reference
from moe_runtime.kernels.quantized import stack_rows
from moe_runtime.kernels.quantized_slots import dense, empty_matrix, put_rows, tensors_of
from moe_runtime.kernels.swiglu import SwiGLU
from moe_runtime.types.weight_format import Code, Scale, WeightFormat

MXFP4, NVFP4 = WeightFormat(Code.FP4, Scale.E8M0, 32), WeightFormat(Code.FP4, Scale.E4M3, 16)
INT4_ZEROS, FP8 = WeightFormat(Code.INT4, Scale.BFLOAT16, 32, has_zero=True), WeightFormat(Code.FP8, Scale.FLOAT32)
CPU = torch.device("cpu")
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=name_of)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[actual.dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@EACH_FORMAT
def test_rows_that_are_put_in_are_those_of_the_matrix(format):
    first, second = random_matrix(format, 5, 72), random_matrix(format, 3, 72)
    matrix = empty_matrix(format, 8, 72, CPU)
    put_rows(matrix, 5, second)
    put_rows(matrix, 0, first)
    whole = stack_rows([first, second])
    assert all(map(torch.equal, map(bits, tensors_of(matrix)), map(bits, tensors_of(whole))))
    assert matrix.nbytes == format.nbytes(8, 72)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def test_rows_of_another_format_are_refused():
    matrix = empty_matrix(MXFP4, 4, 32, CPU)
    for rows in (random_matrix(NVFP4, 4, 32), torch.randn(4, 32)):
        with pytest.raises(AssertionError):
            put_rows(matrix, 0, rows)


def test_slots_are_those_of_the_tensors():
    slots = random_slots(INT4_ZEROS, 3, 6, 40)
    assert slots.shape == (3, 6, 40) and len(slots) == 3
    whole = slots.matrix.dequantize().view(3, 6, 40)
    assert torch.equal(torch.stack([matrix.dequantize() for matrix in slots]), whole)
    put_rows(slots[1], 2, random_matrix(INT4_ZEROS, 4, 40))
    changed = slots.matrix.dequantize().view(3, 6, 40) != whole
    assert changed[1, 2:].any(1).all() and changed.sum() == changed[1, 2:].sum()
    with pytest.raises(IndexError, match="slot: 3 is not allowed; it must be from 0 to 2"):
        slots[3]


@EACH_DTYPE
@EACH_FORMAT
def test_products_are_those_of_the_dequantised_weights(format, dtype):
    counts, row = torch.tensor([3, 0, 5, 1]), torch.randint(6, (9,))
    x = torch.randn(6, 50).to(dtype)
    w13, w2 = random_slots(format, 4, 36, 50), random_slots(format, 4, 50, 18)
    options = {
        "b13_SG": torch.randn(4, 36).to(dtype),
        "b2_SD": torch.randn(4, 50).to(dtype),
        "swiglu": SwiGLU(alpha=1.702, limit=0.9, offset=1.0),
    }
    actual = ops.grouped_mlp(x, row, counts, w13, w2, **options)
    near(actual, reference.grouped_mlp(x, row, counts, w13, w2, **options))
    wide13, wide2 = (w.matrix.dequantize().to(dtype).view(w.shape) for w in (w13, w2))
    assert torch.equal(actual, ops.grouped_mlp(x, row, counts, wide13, wide2, **options))
    assert torch.equal(ops.quantized_linear(x, w13[2]), F.linear(x, wide13[2]))


@EACH_DTYPE
def test_invariant_forms_give_a_row_the_same_bits(dtype):
    format = MXFP4
    counts, row = torch.tensor([3, 0, 5, 1]), torch.randint(6, (9,))
    x = torch.randn(6, 40).to(dtype)
    w13, w2 = random_slots(format, 4, 36, 40), random_slots(format, 4, 40, 18)
    together = invariant_ops.grouped_mlp(x, row, counts, w13, w2)
    near(together, ops.grouped_mlp(x, row, counts, w13, w2))
    alone = invariant_ops.grouped_mlp(x, row[5:6], torch.tensor([0, 0, 1, 0]), w13, w2)
    assert torch.equal(alone[0], together[5])
    bias = torch.randn(36).to(dtype)
    product = invariant_ops.linear(x, w13[3], bias)
    near(product, ops.quantized_linear(x, w13[3], bias))
    assert torch.equal(invariant_ops.linear(x[2:3], w13[3], bias)[0], product[2])


def test_operands_that_do_not_fit_are_refused():
    w13, w2 = random_slots(FP8, 2, 8, 6), random_slots(FP8, 2, 6, 4)
    counts = torch.tensor([1, 3])
    with pytest.raises(ValueError, match=r"x_ND: shape \(4, 5\) is not allowed; it must be \[rows, 6\]"):
        ops.grouped_mlp(torch.randn(4, 5), None, counts, w13, w2)
    with pytest.raises(ValueError, match=r"w13_SGD: shape \(2, 8, 6\) does not fit"):
        ops.grouped_mlp(torch.randn(4, 8), None, counts, w13, w13)
    with pytest.raises(ValueError, match=r"x_NI: torch.float32 \(4, 5\) is not allowed; it must be .* \[rows, 6\]"):
        ops.quantized_linear(torch.randn(4, 5), w13[0])


def test_weights_are_rounded_once():
    weight = random_matrix(MXFP4, 4, 32)
    assert torch.equal(dense(weight, torch.bfloat16), weight.dequantize().bfloat16())
    plain = torch.randn(3, 4)
    assert dense(plain, torch.float32) is plain
