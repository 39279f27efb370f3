"""Quantised matrices: codes, scales, and what they stand for. The slow twin of every kernel that computes from codes.

Shape suffixes: N outputs, K inputs, G groups of inputs, S super-groups: inputs that share a factor of their scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from moe_runtime.types.weight_format import SUPER_GROUP, Code, Scale, WeightFormat

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INT4_ZERO = 8  # codes of INT4 are 0 to 15; without zeros, 8 stands for 0
FP8_MAX, FP4_MAX = 448.0, 6.0
SMALLEST_NORMAL = 2.0**-126  # scales below it have no finite inverse; their weights are 0
E8M0_NAN = 255  # makes all weights of a group NaN or infinite
PIECE = 1 << 17  # weights that are quantised at once: in float32, they and what is made of them fit into an L2 cache


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix `[N, K]`, or some of its rows: weight = (code - zero) * (scale * factor) + offset, all in float32.

    Attributes:
        format: its code, the type of its scales, its group.
        codes: uint8. INT4, UINT4, FP4: `[N, ceil(K / 2)]`, the low half of a byte is the even column. INT8: two's
            complement, with offsets from 0 to 31, so that the product with a float16 or INT8 scale is exact.
        scales_NG: of the type `format.scale`; for E8M0 uint8.
        zeros_NG: uint8, as the codes are (0 to 15 for INT4, two's complement for INT8); None without zeros: then INT4
            has the zero 8, other codes the zero 0.
        factor_NS: of the type `format.scale.factor`, or float64 where it stands for a division by its reciprocal;
            None: 1. The product with a scale is rounded once, to float32. Kernels round the factor before.
        num_inputs: K.
        offsets_NG: what is added, of the type of the scales; None without offsets.
        offset_factor_NS: what offsets are multiplied with, as scales are by `factor_NS`.
    """

    format: WeightFormat
    codes: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor | None
    factor_NS: Tensor | None
    num_inputs: int
    offsets_NG: Tensor | None = None
    offset_factor_NS: Tensor | None = None

    def __post_init__(self) -> None:
        format, num_rows = self.format, len(self.codes)
        assert format.scale is not None
        groups, factors = ((num_rows, count(self.num_inputs)) for count in (format.num_groups, format.num_factors))
        scale = getattr(torch, format.scale.dtype)
        assert self.codes.dtype == torch.uint8
        assert self.codes.shape == (num_rows, -(-self.num_inputs * format.code.bits // 8))
        assert self.scales_NG.dtype == scale and self.scales_NG.shape == groups
        assert _fits(self.zeros_NG, format.has_zero, groups, torch.uint8)
        assert _fits(self.offsets_NG, format.has_offset, groups, scale)
        has_factor = format.scale.factor is not None
        assert _fits(self.factor_NS, has_factor, factors)
        assert _fits(self.offset_factor_NS, has_factor and format.has_offset, factors)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """What kernels take: codes, scales, zeros, factors, offsets and their factors."""
        factor_NS = self.factor_NS
        if factor_NS is not None and factor_NS.dtype == torch.float64:
            factor_NS = factor_NS.float()
        return self.codes, self.scales_NG, self.zeros_NG, factor_NS, self.offsets_NG, self.offset_factor_NS

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, index: slice | Tensor) -> QuantizedMatrix:
        """Some rows, by a slice or by numbers."""
        return self._changed(lambda part: part[index])

    def to(self, device: torch.device) -> QuantizedMatrix:
        """The same on a device."""
        return self._changed(lambda part: part.to(device))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> QuantizedMatrix:
        """The matrix whose tensors are made of this one's."""
        return self._with({name: change(tensor) for name, tensor in self._tensors().items()})

    def _with(self, tensors: Mapping[str, Any]) -> QuantizedMatrix:
        """The matrix with other tensors, by the names of its attributes."""
        return replace(self, **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        """Its tensors, by the names of its attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def scales(self) -> Tensor:
        """What a group's values are multiplied with, `[N, G]` float32."""
        return self._with_factors(self.scales_NG, self.factor_NS)

    def offsets(self) -> Tensor | None:
        """What is added to a group's weights, `[N, G]` float32; None: nothing."""
        return None if self.offsets_NG is None else self._with_factors(self.offsets_NG, self.offset_factor_NS)

    def _with_factors(self, numbers_NG: Tensor, factor_NS: Tensor | None) -> Tensor:
        numbers_NG = decode_scales(numbers_NG)
        if factor_NS is None:
            return numbers_NG
        factor_NG = factor_NS.double()
        if self.format.scale is Scale.INT8 and self.format.group:
            per_factor = SUPER_GROUP // self.format.group
            factor_NG = factor_NG.repeat_interleave(per_factor, dim=1)[:, : numbers_NG.shape[1]]
        return (numbers_NG.double() * factor_NG).float()

    def values(self) -> Tensor:
        """Codes less their zeros, `[N, K]` float32."""
        values_NK = decode_codes(self.format.code, self.codes, self.num_inputs)
        if self.zeros_NG is None:
            return values_NK
        is_int8 = self.format.code is Code.INT8
        zeros_NG = self.zeros_NG.view(torch.int8).float() if is_int8 else self.zeros_NG.float() - INT4_ZERO
        return values_NK - self._spread(zeros_NG)

    def dequantize(self) -> Tensor:
        """The weights `[N, K]`, float32; an offset is added to the rounded product."""
        weights_NK, offsets_NG = self.values() * self._spread(self.scales()), self.offsets()
        return weights_NK if offsets_NG is None else weights_NK + self._spread(offsets_NG)

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
    first, tensors = parts[0], [part._tensors() for part in parts]
    assert all(part.format == first.format and part.num_inputs == first.num_inputs for part in parts)
    return first._with({name: torch.cat([each[name] for each in tensors]) for name in tensors[0]})


def _fits(tensor: Tensor | None, given: bool, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> bool:
    """Whether a tensor is there if and only if it is `given`, with a shape and a dtype (None: any)."""
    if tensor is None or not given:
        return tensor is None and not given
    return tensor.shape == shape and dtype in (None, tensor.dtype)


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
    if code in (Code.INT4, Code.UINT4):
        return halves.float() - INT4_ZERO * (code is Code.INT4)
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
        format: without offsets and INT8 scales.
    """
    rows = max(1, PIECE // weight_NK.shape[1])
    return _concatenate([_quantize_rows(rows_NK, format) for rows_NK in weight_NK.split(rows)])


def _quantize_rows(weight_NK: Tensor, format: WeightFormat) -> QuantizedMatrix:
    assert format.scale not in (None, Scale.INT8) and not format.has_offset
    rows, inputs = weight_NK.shape
    group, groups = format.group or inputs, format.num_groups(inputs)
    padded = weight_NK.float()
    if missing := groups * group - inputs:  # pad copies even if nothing is missing
        padded = torch.nn.functional.pad(padded, (0, missing))
    padded = padded.view(rows, groups, group)
    largest_NG, code = padded.abs().amax(dim=2), format.code
    factor_N1: Tensor | None = None
    if format.scale is Scale.E8M0:
        assert code is Code.FP4
        exponent = torch.frexp(largest_NG).exponent - 1 - 2  # E2M1's largest is 1.5 * 2^2
        stored = (exponent + 127).clamp(0, 254).to(torch.uint8)
        stored[~largest_NG.isfinite()] = E8M0_NAN
    elif format.scale is Scale.E4M3:
        assert code is Code.FP4
        factor_N1 = largest_NG.amax(dim=1, keepdim=True) / (FP8_MAX * FP4_MAX)
        stored = (largest_NG / FP4_MAX / factor_N1.clamp(min=1e-38)).to(torch.float8_e4m3fn)
    else:
        dtype: torch.dtype = getattr(torch, format.scale.dtype)
        if code is Code.INT4:
            extreme_NG = torch.where(padded.amax(dim=2) == largest_NG, largest_NG, -largest_NG)
            stored = (extreme_NG / -INT4_ZERO).to(dtype)
        else:
            stored = (largest_NG / {Code.INT8: 127.0, Code.FP8: FP8_MAX, Code.FP4: FP4_MAX}[code]).to(dtype)
    scales_NG = decode_scales(stored)
    if factor_N1 is not None:
        scales_NG = scales_NG * factor_N1
    inverse = torch.where(scales_NG.abs() >= SMALLEST_NORMAL, 1.0 / scales_NG, 0.0)
    scaled = (padded * inverse[:, :, None]).flatten(1)[:, :inputs]
    zeros_NG = None
    if format.has_zero:
        zeros_NG = torch.full_like(stored, INT4_ZERO if code is Code.INT4 else 0, dtype=torch.uint8)
    return QuantizedMatrix(format, _encode(code, scaled), stored, zeros_NG, factor_N1, inputs)


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
