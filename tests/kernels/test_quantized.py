"""The twin itself: what codes stand for, and quantising to nearest."""

from __future__ import annotations

import pytest
import torch
from quantized_matrices import FORMATS, QUANTIZABLE, name_of, random_matrix

from moe_runtime.config.quantization import METHODS
from moe_runtime.kernels import quantized
from moe_runtime.kernels.quantized import E2M1, QuantizedMatrix, decode_codes, quantize, stack_rows
from moe_runtime.types.weight_format import Code, Scale, WeightFormat


def nearest_value(code: Code, scaled: float) -> float:
    """By trying all values of a code; a tie goes to the even code."""
    if code is Code.FP4:
        values = [*E2M1, *(-x for x in E2M1)]
    elif code is Code.FP8:
        return float(torch.tensor(scaled).clamp(-448, 448).to(torch.float8_e4m3fn))
    else:
        values = list(range(-8, 8)) if code is Code.INT4 else list(range(-127, 128))
    distance = min(abs(value - scaled) for value in values)
    ties = [place for place, value in enumerate(values) if abs(value - scaled) == distance]
    return float(values[min(ties, key=lambda place: values[place] % 2 if code is not Code.FP4 else place % 2)])


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_becomes_the_nearest_value(method: str) -> None:
    format = METHODS[method]
    weight = torch.randn(5, 150)
    weight[1, :32] = 0
    weight[2, 40] = 30.0
    matrix = quantize(weight, format)
    scales = matrix.scales_NG
    scale = torch.exp2(scales.float() - 127) if format.scale is Scale.E8M0 else scales.float()
    values = decode_codes(format.code, matrix.codes, 150)
    for row, column in torch.cartesian_prod(torch.arange(5), torch.randperm(150)[:40]).tolist():
        own = scale[row, column // format.group]
        inverse = 1.0 / own if own else torch.tensor(0.0)
        assert values[row, column] == nearest_value(format.code, float(weight[row, column] * inverse))


def test_halves_go_to_the_even_code() -> None:
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight = torch.zeros(4, 32)
    weight[:, 0] = 6.0  # the scale is 1
    weight[0, 1:8], weight[1, 1:8] = halves, -halves
    weight[2, 1:8], weight[3, 1:8] = halves.nextafter(torch.tensor(0.0)), halves.nextafter(torch.tensor(9.0))
    values = quantize(weight, METHODS["mxfp4"]).dequantize()
    assert values.tolist() == [[nearest_value(Code.FP4, value) for value in row] for row in weight.tolist()]


@pytest.mark.parametrize("format", QUANTIZABLE, ids=name_of)
def test_rows_are_quantised_apart(format: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 100)
    whole = quantize(weight, format)
    monkeypatch.setattr(quantized, "PIECE", 250)  # two rows and a rest
    for part, piece in zip(whole.parts, quantize(weight, format).parts, strict=True):
        assert part is piece is None or torch.equal(part.view(torch.uint8), piece.view(torch.uint8))


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_at_most_half_a_step(method: str) -> None:
    weight = torch.randn(64, 256).bfloat16()
    found = quantize(weight, METHODS[method]).dequantize()
    group = METHODS[method].group
    largest = weight.float().view(64, -1, group).abs().amax(2, keepdim=True)
    error = (found - weight.float()).view(64, -1, group).abs() / largest
    bound = {"int8": 0.005, "int4": 0.13, "fp8": 0.036, "mxfp4": 0.26}[method]
    assert error.max() <= bound and error.mean() <= bound / 2


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_dequantised_weights_follow_the_formula(format: WeightFormat) -> None:
    """One weight at a time, in Python."""
    inputs = 293 if format.scale is Scale.INT8 else 37
    matrix = random_matrix(format, 3, inputs)
    found, group = matrix.dequantize(), format.group or inputs
    for row in range(3):
        for column in range(0, inputs, 1 + inputs // 100):
            if format.code.bits == 4:
                code = int(matrix.codes[row, column // 2]) >> 4 * (column % 2) & 15
            else:
                code = int(matrix.codes[row, column])
            zero = 0 if matrix.zeros_NG is None else int(matrix.zeros_NG[row, column // group])
            match format.code:
                case Code.INT4:
                    value = code - (zero if format.has_zero else 8)
                case Code.UINT4:
                    value = code
                case Code.INT8:
                    value = (code ^ 128) - 128 - ((zero ^ 128) - 128)
                case Code.FP4:
                    value = E2M1[code & 7] * (-1 if code & 8 else 1)
                case _:
                    exponent, mantissa = code >> 3 & 15, code & 7
                    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
                    value = -size if code & 128 else size
            stored = matrix.scales_NG[row, column // group]
            scale = torch.tensor(2.0 ** (int(stored) - 127)) if format.scale is Scale.E8M0 else stored.float()
            if matrix.factor_NS is not None:
                scale = scale * matrix.factor_NS[row, column // 256].float()
            wanted = torch.tensor(float(value)) * scale
            if matrix.offsets_NG is not None:
                offset = matrix.offsets_NG[row, column // group].float()
                if matrix.offset_factor_NS is not None:
                    offset = offset * matrix.offset_factor_NS[row, column // 256].float()
                wanted = wanted + offset
            assert found[row, column] == wanted


@pytest.mark.parametrize("format", QUANTIZABLE, ids=name_of)
def test_every_format_can_be_quantised_into(format: WeightFormat) -> None:
    weight = torch.randn(20, 100)
    found = quantize(weight, format)
    error = (found.dequantize() - weight).norm() / weight.norm()
    assert found.format == format and error < (0.15 if format.code.bits == 4 else 0.04)


@pytest.mark.parametrize("format", QUANTIZABLE, ids=name_of)
@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_become_none(format: WeightFormat, damage: float) -> None:
    weight = torch.randn(20, 100)
    weight[3, 40] = damage
    found = quantize(weight, format).dequantize()
    assert not found[3].isfinite().all() and found[4].isfinite().all()


def test_rows_and_stacks() -> None:
    for format in FORMATS:
        first, second = random_matrix(format, 6, 40), random_matrix(format, 3, 40)
        both = stack_rows([first, second])
        assert isinstance(both, QuantizedMatrix)
        index = torch.tensor([8, 0, 3])
        values = torch.cat([first.dequantize(), second.dequantize()])
        assert torch.equal(both.rows(index).dequantize(), values[index])
        assert both.nbytes == format.nbytes(9, 40)


@pytest.mark.parametrize("format", QUANTIZABLE, ids=name_of)
def test_weights_of_any_size_become_finite(format: WeightFormat) -> None:
    weight = torch.randn(4, 256)
    weight[0], weight[1], weight[2, :128] = 0, weight[1] * 1e-40, 1e-39
    found = quantize(weight, format).dequantize()
    assert found.isfinite().all() and found[:2].abs().max() < 1e-36
