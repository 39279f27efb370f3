"""Weights that are checked for NaN and infinity as they are read (`check_weights`)."""

from __future__ import annotations

import torch
from torch import Tensor

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

    def release_all(self) -> None:
        self._source.release_all()
