"""Weights that are checked for NaN and infinity as they are read (`check_weights`)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix, decode_scales
from moe_runtime.types.weight_format import Code, WeightFormat
from moe_runtime.weights.checkpoint import ALL_ROWS, WeightSource


class CheckedWeights:
    """A `WeightSource` that refuses tensors of another with values that are not finite."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS) -> Tensor:
        tensor = self._source.read(name, shape, index, rows)
        lowest, highest = tensor.aminmax()  # a NaN is both
        if not (lowest.isfinite() and highest.isfinite()):
            is_bad = tensor.isfinite().logical_not_()
            first, *rest = torch.nonzero(is_bad)[0].tolist()
            place = [*([] if index is None else [index]), first + (rows.start or 0), *rest]
            count = f"{int(is_bad.sum())} of {tensor.numel()} values read"
            raise ValueError(f"model: tensor {name!r} is damaged: {count} are NaN or infinite, the first at {place}")
        return tensor

    def format_of(self, name: str) -> WeightFormat | None:
        return self._source.format_of(name)

    def read_quantized(
        self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS
    ) -> QuantizedMatrix:
        matrix = self._source.read_quantized(name, shape, index, rows)
        checked = {"scales": decode_scales(matrix.scales_NG)}
        named = {
            "factors": matrix.factor_NS,
            "offsets": matrix.offsets_NG,
            "factors of offsets": matrix.offset_factor_NS,
        }
        checked |= {what: tensor for what, tensor in named.items() if tensor is not None}
        if matrix.format.code is Code.FP8:  # other codes are always numbers
            checked["codes"] = matrix.codes.view(torch.float8_e4m3fn).float()
        for what, values in checked.items():
            if num_bad := int(values.isfinite().logical_not_().sum()):
                count = f"{num_bad} of {values.numel()} {what} read"
                raise ValueError(f"model: tensor {name!r} is damaged: {count} are NaN or infinite")
        return matrix

    def release_all(self) -> None:
        self._source.release_all()
