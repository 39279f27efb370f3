"""Quantised matrices: codes, scales, and what they stand for. The slow twin of every kernel that computes from codes.

Shape suffixes: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from moe_runtime.types.weight_format import Code, Scale, WeightFormat

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INT4_ZERO = 8  # codes of INT4 are 0 to 15; without zeros, 8 stands for 0
FP8_MAX, FP4_MAX = 448.0, 6.0
SMALLEST_NORMAL = 2.0**-126  # scales below it have no finite inverse; their weights are 0
PIECE = 1 << 17  # weights that are quantised at once: in float32, they and what is made of them fit into an L2 cache


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix `[N, K]`, or some of its rows: weight = (code - zero) * (scale * factor), all in float32.

    Attributes:
        format: its code, the type of its scales, its group.
        codes: uint8. INT4, FP4: `[N, ceil(K / 2)]`, the low half of a byte is the even column. INT8: two's complement.
        scales_NG: of the type `format.scale`; for E8M0 uint8.
        zeros_NG: uint8, as the codes are (0 to 15 for INT4, two's complement for INT8); None without zeros: then INT4
            has the zero 8 and INT8 the zero 0.
        factor_N: float32, or float64 where it stands for a division by its reciprocal; None: 1. Given if and only if
            scales are E4M3. The product with a scale is rounded once, to float32. Kernels round the factor before.
        num_inputs: K.
    """

    format: WeightFormat
    codes: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor | None
    factor_N: Tensor | None
    num_inputs: int

    def __post_init__(self) -> None:
        shape = (len(self.codes), self.format.num_groups(self.num_inputs))
        width = -(-self.num_inputs * self.format.code.bits // 8)
        assert self.format.scale is not None and str(self.scales_NG.dtype) == f"torch.{self.format.scale.dtype}"
        assert self.codes.dtype == torch.uint8 and self.codes.shape == (shape[0], width)
        assert self.scales_NG.shape == shape
        assert (self.zeros_NG is not None) == self.format.has_zero
        assert self.zeros_NG is None or (self.zeros_NG.dtype == torch.uint8 and self.zeros_NG.shape == shape)
        assert (self.factor_N is not None) == (self.format.scale is Scale.E4M3)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What kernels take: codes, scales, zeros, and factors in float32."""
        return self.codes, self.scales_NG, self.zeros_NG, None if self.factor_N is None else self.factor_N.float()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, index: slice | Tensor) -> QuantizedMatrix:
        """Some rows, by a slice or by numbers."""
        return QuantizedMatrix(
            self.format,
            self.codes[index],
            self.scales_NG[index],
            None if self.zeros_NG is None else self.zeros_NG[index],
            None if self.factor_N is None else self.factor_N[index],
            self.num_inputs,
        )

    def to(self, device: torch.device) -> QuantizedMatrix:
        """The same on a device."""
        return QuantizedMatrix(
            self.format,
            self.codes.to(device),
            self.scales_NG.to(device),
            None if self.zeros_NG is None else self.zeros_NG.to(device),
            None if self.factor_N is None else self.factor_N.to(device),
            self.num_inputs,
        )

    def scales(self) -> Tensor:
        """What a group's values are multiplied with, `[N, G]` float32."""
        scales_NG = decode_scales(self.scales_NG)
        return scales_NG if self.factor_N is None else (scales_NG.double() * self.factor_N[:, None]).float()

    def values(self) -> Tensor:
        """Codes less their zeros, `[N, K]` float32."""
        values_NK = decode_codes(self.format.code, self.codes, self.num_inputs)
        if self.zeros_NG is None:
            return values_NK
        is_int8 = self.format.code is Code.INT8
        zeros_NG = self.zeros_NG.view(torch.int8).float() if is_int8 else self.zeros_NG.float() - INT4_ZERO
        return values_NK - self._spread(zeros_NG)

    def dequantize(self) -> Tensor:
        """The weights `[N, K]`, float32."""
        return self.values() * self._spread(self.scales())

    def _spread(self, x_NG: Tensor) -> Tensor:
        """The numbers of groups for each of their inputs, `[N, K]`."""
        return x_NG.repeat_interleave(self.format.group or self.num_inputs, dim=1)[:, : self.num_inputs]


@overload
def take_rows(matrix: Tensor, index: slice | Tensor) -> Tensor: ...
@overload
def take_rows(matrix: QuantizedMatrix, index: slice | Tensor) -> QuantizedMatrix: ...
def take_rows(matrix: Tensor | QuantizedMatrix, index: slice | Tensor) -> Tensor | QuantizedMatrix:
    """Some rows of a matrix of any kind."""
    return matrix[index] if isinstance(matrix, Tensor) else matrix.rows(index)


def stack_rows(parts: Sequence[Tensor | QuantizedMatrix]) -> Tensor | QuantizedMatrix:
    """The rows of matrices of one kind, in order."""
    if len(parts) == 1:
        return parts[0]
    dense = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat(dense) if dense else _concatenate([part for part in parts if isinstance(part, QuantizedMatrix)])


def _concatenate(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    first = parts[0]
    assert all(part.format == first.format and part.num_inputs == first.num_inputs for part in parts)

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        found = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(found) if found else None

    codes, scales_NG = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales_NG"))
    zeros_NG, factor_N = (joined([getattr(part, name) for part in parts]) for name in ("zeros_NG", "factor_N"))
    return QuantizedMatrix(first.format, codes, scales_NG, zeros_NG, factor_N, first.num_inputs)


def decode_scales(scales: Tensor) -> Tensor:
    """Scales in float32; uint8 is E8M0, whose byte is the exponent's, so that 2^-127 becomes 0."""
    if scales.dtype == torch.uint8:
        return (scales.int() << 23).view(torch.float32)
    return scales.float()


def decode_codes(code: Code, codes: Tensor, num_inputs: int) -> Tensor:
    """What codes stand for before zeros and scales, float32 `[N, K]`; INT4 is from -8 to 7."""
    if code is Code.INT8:
        return codes.view(torch.int8).float()
    if code is Code.FP8:
        return codes.view(torch.float8_e4m3fn).float()
    halves = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., :num_inputs]
    if code is Code.INT4:
        return halves.float() - INT4_ZERO
    assert code is Code.FP4
    table = torch.tensor([*E2M1, *(-x for x in E2M1)], device=codes.device)
    return table[halves.long()]


def pack_halves(halves_NK: Tensor) -> Tensor:
    """Codes of 4 bits, uint8 `[N, K]`, two in a byte; an odd K is filled up with the code 0."""
    if halves_NK.shape[1] % 2:
        halves_NK = torch.nn.functional.pad(halves_NK, (0, 1))
    return halves_NK[:, 0::2] | halves_NK[:, 1::2] << 4


def quantize(weight_NK: Tensor, format: WeightFormat) -> QuantizedMatrix:
    """Quantise to nearest, ties to even. Zeros, if the format has them, are those of formats without.

    The largest weight of a group gets the largest code: scale = max / largest. With INT4 it gets -8, the code that is
    farthest from 0, so the scale has the other sign, and a weight that is nearly as large on the other side becomes 7.
    E8M0 scales are the powers of two 2^(floor(log2(max)) - 2) of OCP's MX formats, section 6.3; what is too large
    becomes the largest code. E4M3 scales have a factor that makes an output's largest one 448.

    Args:
        weight_NK: float32 or bfloat16, finite.
    """
    rows = max(1, PIECE // weight_NK.shape[1])
    return _concatenate([_quantize_rows(rows_NK, format) for rows_NK in weight_NK.split(rows)])


def _quantize_rows(weight_NK: Tensor, format: WeightFormat) -> QuantizedMatrix:
    assert format.scale is not None
    rows, inputs = weight_NK.shape
    group, groups = format.group or inputs, format.num_groups(inputs)
    padded = weight_NK.float()
    if missing := groups * group - inputs:  # pad copies even if nothing is missing
        padded = torch.nn.functional.pad(padded, (0, missing))
    padded = padded.view(rows, groups, group)
    largest_NG, code = padded.abs().amax(dim=2), format.code
    factor_N: Tensor | None = None
    if format.scale is Scale.E8M0:
        assert code is Code.FP4
        exponent = torch.frexp(largest_NG).exponent - 1 - 2  # E2M1's largest is 1.5 * 2^2
        stored = (exponent + 127).clamp(0, 254).to(torch.uint8)
    elif format.scale is Scale.E4M3:
        assert code is Code.FP4
        factor_N = largest_NG.amax(dim=1) / (FP8_MAX * FP4_MAX)
        stored = (largest_NG / FP4_MAX / factor_N.clamp(min=1e-38)[:, None]).to(torch.float8_e4m3fn)
    else:
        dtype: torch.dtype = getattr(torch, format.scale.dtype)
        if code is Code.INT4:
            extreme_NG = torch.where(padded.amax(dim=2) == largest_NG, largest_NG, -largest_NG)
            stored = (extreme_NG / -INT4_ZERO).to(dtype)
        else:
            stored = (largest_NG / {Code.INT8: 127.0, Code.FP8: FP8_MAX, Code.FP4: FP4_MAX}[code]).to(dtype)
    scales_NG = decode_scales(stored)
    if factor_N is not None:
        scales_NG = scales_NG * factor_N[:, None]
    inverse = torch.where(scales_NG.abs() >= SMALLEST_NORMAL, 1.0 / scales_NG, 0.0)
    scaled = (padded * inverse[:, :, None]).flatten(1)[:, :inputs]
    zeros_NG = None
    if format.has_zero:
        zeros_NG = torch.full_like(stored, INT4_ZERO if code is Code.INT4 else 0, dtype=torch.uint8)
    return QuantizedMatrix(format, _encode(code, scaled), stored, zeros_NG, factor_N, inputs)


def _encode(code: Code, scaled_NK: Tensor) -> Tensor:
    """Codes of the nearest values, for weights divided by their scales, which are overwritten."""
    if code is Code.INT8:
        return scaled_NK.round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    if code is Code.FP8:
        return scaled_NK.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    if code is Code.INT4:
        return pack_halves(scaled_NK.round_().clamp_(-8, 7).add_(INT4_ZERO).to(torch.uint8))
    assert code is Code.FP4
    # E2M1's values are 1/2 apart up to 2, 1 apart up to 4, then 2 apart, so a code is the lowest of three lines.
    # `round` takes ties to the even code on each of them.
    size_NK = scaled_NK.abs()
    low_NK, middle_NK = (size_NK * 2.0).round_(), size_NK.round().add_(2.0)
    high_NK = size_NK.mul_(0.5).round_().add_(4.0).clamp_(max=7.0)
    index_NK = torch.minimum(torch.minimum(low_NK, middle_NK, out=low_NK), high_NK, out=low_NK).to(torch.uint8)
    return pack_halves(index_NK | (scaled_NK < 0).to(torch.uint8) << 3)
