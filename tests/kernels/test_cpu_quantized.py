"""Quantised weights in the native kernels, on every instruction set that this machine has."""

from __future__ import annotations

import pytest
import torch
from quantized_matrices import FORMATS, name_of, random_matrix

from moe_runtime.kernels.cpu.native import Kernels
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear
from moe_runtime.kernels.int8_rows import linear_int8_rows
from moe_runtime.kernels.quantized import stack_rows
from moe_runtime.kernels.swiglu import SwiGLU
from moe_runtime.types.weight_format import BlockFormats, Code, Scale, WeightFormat

BF16_PRODUCTS = ("avx512_bf16", "amx_bf16")  # kernels that round weights to bfloat16
SIZES = [(64, 64), (130, 200), (67, 33), (256, 520)]  # outputs, inputs
ROWS = (1, 2, 3, 4, 7, 17, 100)


def packed(kernels: Kernels, matrix, dtype, bias=None) -> PackedLinear:
    linear = PackedLinear(kernels, len(matrix), matrix.num_inputs, dtype, bias, matrix.format)
    linear.put(0, matrix)
    return linear


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_unpacked_values_are_those_of_the_twin(kernels: Kernels, format: WeightFormat) -> None:
    for outputs, inputs in SIZES:
        matrix = random_matrix(format, outputs, inputs)
        linear = packed(kernels, matrix, torch.float32)
        assert torch.equal(linear.unpack(), matrix.dequantize())
        assert linear.nbytes == format.nbytes(outputs, inputs, native=True)
        assert torch.equal(packed(kernels, matrix, torch.bfloat16).unpack(), matrix.dequantize().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_products_are_those_of_the_twin(kernels: Kernels, format: WeightFormat, dtype: torch.dtype) -> None:
    rounds = dtype == torch.bfloat16 and kernels.instruction_set in BF16_PRODUCTS
    for outputs, inputs in SIZES:
        matrix = random_matrix(format, outputs, inputs)
        bias = torch.randn(outputs).to(dtype)
        linear = packed(kernels, matrix, dtype, bias)
        weight = matrix.dequantize()
        for rows in ROWS:
            x = torch.randn(rows, inputs).to(dtype)
            found = linear(x, float32=True)
            wanted = x.double() @ (weight.to(dtype) if rounds else weight).double().T + bias
            spread = x.double().abs() @ weight.double().abs().T + bias.abs()
            assert ((found - wanted).abs() <= spread * 2e-6 + 1e-30).all()
            if rounds:
                assert torch.equal(found, PackedLinear.pack(kernels, weight.to(dtype), bias)(x, float32=True))


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(kernels: Kernels, format: WeightFormat) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        linear = packed(kernels, random_matrix(format, 100, 300), dtype)
        x = torch.randn(97, 300).to(dtype)
        whole = linear(x, float32=True)
        for first, count in ((0, 1), (5, 2), (9, 3), (20, 4), (40, 16), (60, 33)):
            assert torch.equal(linear(x[first : first + count], float32=True), whole[first : first + count])


def test_rows_may_be_put_in_by_panels(kernels: Kernels) -> None:
    format = WeightFormat(Code.INT4, Scale.BFLOAT16, 32)
    matrix = random_matrix(format, 150, 96)
    linear = PackedLinear(kernels, 150, 96, torch.bfloat16, format=format)
    linear.put(128, matrix.rows(slice(128, 150)))
    linear.put(0, matrix.rows(slice(0, 128)))
    assert torch.equal(linear.matrix.data, packed(kernels, matrix, torch.bfloat16).matrix.data)


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_experts_are_those_of_the_values(kernels: Kernels, format: WeightFormat) -> None:
    slots, hidden, inner, dtype = 3, 72, 40, torch.bfloat16
    swiglu = SwiGLU(1.702, 7.0, 1.0)
    experts = PackedExperts(
        kernels, slots, hidden, inner, dtype, swiglu=swiglu, has_bias=True, formats=BlockFormats(format, format)
    )
    dense = PackedExperts(kernels, slots, hidden, inner, torch.float32, swiglu=swiglu, has_bias=True)
    for slot in range(slots):
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            matrix = random_matrix(format, *shape)
            values = matrix.dequantize()
            if kernels.instruction_set in BF16_PRODUCTS:
                values = values.bfloat16().float()
            experts.put(slot, part, 0, matrix)
            dense.put(slot, part, 0, values)
            bias = torch.randn(shape[0]).bfloat16()
            experts.put(slot, f"{part}_bias", 0, bias)
            dense.put(slot, f"{part}_bias", 0, bias.float())
    counts = torch.tensor([1, 0, 8])
    x = torch.randn(9, hidden).to(dtype)
    found, wanted = experts(x, None, counts), dense(x.float(), None, counts)
    assert torch.isfinite(found).all()
    assert ((found - wanted).abs() <= 0.02 * wanted.abs().amax(dim=1, keepdim=True)).all()


def test_a_slot_is_stored_as_its_codes(kernels: Kernels) -> None:
    format = WeightFormat(Code.INT8, Scale.FLOAT32)
    experts = PackedExperts(kernels, 2, 64, 64, torch.bfloat16, formats=BlockFormats(format, format))
    matrices = {part: random_matrix(format, 64, 64) for part in ("gate", "up", "down")}
    for slot in range(2):
        for part, matrix in matrices.items():
            experts.put(slot, part, 0, matrix)
    assert all(torch.equal(a, b) for a, b in zip(experts.stored(0), experts.stored(1), strict=True))
    gate, up, down = experts.unpack(1)
    both = stack_rows([matrices["gate"], matrices["up"]]).dequantize().bfloat16()
    assert torch.equal(torch.cat([gate, up]), both)
    assert torch.equal(down, matrices["down"].dequantize().bfloat16())


INTEGER_FORMATS = [format for format in FORMATS if format.code is not Code.FP8]


@pytest.mark.parametrize("format", INTEGER_FORMATS, ids=name_of)
def test_products_with_int8_rows_are_those_of_the_twin(byte_kernels: Kernels, format: WeightFormat) -> None:
    """To the bit: sums of integers are exact, and the rest is in one order."""
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, inputs in SIZES:
            matrix = random_matrix(format, outputs, inputs)
            linear = PackedLinear(byte_kernels, outputs, inputs, dtype, format=format, int8_rows=True)
            linear.put(0, matrix)
            x = torch.randn(100, inputs).to(dtype)
            x[3], x[5] = 0, 1e-38 * x[5]
            wanted = linear_int8_rows(x, matrix)
            for rows in ROWS:
                assert torch.equal(linear(x[:rows], float32=True), wanted[:rows])


def test_fp8_ignores_int8_rows(byte_kernels: Kernels) -> None:
    matrix, x = random_matrix(WeightFormat(Code.FP8, Scale.FLOAT32, 128), 64, 128), torch.randn(3, 128)
    linear = PackedLinear(byte_kernels, 64, 128, torch.float32, format=matrix.format, int8_rows=True)
    linear.put(0, matrix)
    assert torch.equal(linear(x), packed(byte_kernels, matrix, torch.float32)(x))


def test_experts_with_int8_rows(byte_kernels: Kernels) -> None:
    format = WeightFormat(Code.INT4, Scale.BFLOAT16, 32)
    slots, hidden, inner = 3, 96, 160
    experts = PackedExperts(
        byte_kernels, slots, hidden, inner, torch.float32, formats=BlockFormats(format, format), int8_rows=True
    )
    matrices = [
        [random_matrix(format, *shape) for shape in ((inner, hidden), (inner, hidden), (hidden, inner))]
        for _ in range(slots)
    ]
    for slot, parts in enumerate(matrices):
        for part, matrix in zip(("gate", "up", "down"), parts, strict=True):
            experts.put(slot, part, 0, matrix)
    x, row, counts = torch.randn(5, hidden), torch.tensor([4, 0, 0, 2, 3, 1]), torch.tensor([2, 0, 4])
    found = experts(x, row, counts)
    for index, slot in enumerate([0, 0, 2, 2, 2, 2]):
        gate, up, down = matrices[slot]
        one = x[row[index]][None]
        hidden_row = torch.nn.functional.silu(linear_int8_rows(one, gate)) * linear_int8_rows(one, up)
        assert torch.allclose(found[index], linear_int8_rows(hidden_row, down)[0], rtol=1e-2, atol=1e-4)
    assert torch.equal(experts(x[row[2:4]], None, torch.tensor([0, 0, 2])), found[2:4])
