"""The weights in GGUF files, by the names that a family's checkpoints have."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix, stack_rows
from moe_runtime.system.pages import give_freed_memory_back
from moe_runtime.types.weight_format import WeightFormat
from moe_runtime.weights.checkpoint import ALL_ROWS
from moe_runtime.weights.formats.gguf import quantized, values
from moe_runtime.weights.gguf_file import Gguf, Place

Blocks = list[tuple[str, Tensor]]  # the type and the bytes of rows


class GgufWeights:
    """A `WeightSource`: reads the tensors of the plain model, and of experts only those that are asked for.

    Args:
        gguf: the model's files; all types are in `gguf_file.READABLE`.
        locate: where a tensor of the plain model lies; None: it is not in the files.

    Attributes:
        bytes_read: bytes of all tensors read.
    """

    def __init__(self, gguf: Gguf, locate: Callable[[str], Place | None]) -> None:
        self.gguf, self._locate = gguf, locate
        self.bytes_read = 0

    def has(self, name: str) -> bool:
        return self._locate(name) is not None

    def format_of(self, name: str) -> WeightFormat | None:
        """How a matrix is stored; None: it is not quantised, or can only be read dequantised."""
        return self.gguf.format_of(self._locate(name))

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS) -> Tensor:
        """As `WeightSource.read`; quantised weights are dequantised to float32."""
        if index is not None:
            return self.read(name, shape, rows=slice(index, index + 1))[0][rows]
        place = self._find(name)
        if place.by_head:
            return self._read_by_head(name, place, shape)[rows]
        parts = [values(dtype, raw, shape[-1]) for dtype, raw in self._read_blocks(name, place, shape, rows)]
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found.view(shape)[rows] if len(shape) == 1 else found.view(-1, *shape[1:])

    def read_quantized(
        self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS
    ) -> QuantizedMatrix:
        """A quantised matrix or some of its rows; `format_of` must give its format. Raises ValueError as `read`."""
        assert index is None and self.format_of(name) is not None
        blocks = self._read_blocks(name, self._find(name), shape, rows)
        found = stack_rows([quantized(dtype, raw, shape[-1]) for dtype, raw in blocks])
        assert isinstance(found, QuantizedMatrix)
        return found

    def release_all(self) -> None:
        """Return freed memory to the system."""
        give_freed_memory_back()

    def _find(self, name: str) -> Place:
        place = self._locate(name)
        if place is None:
            raise ValueError(f"model: {self.gguf.path} has no tensor for {name!r}")
        return place

    def _read_blocks(self, name: str, place: Place, shape: tuple[int, ...], rows: slice) -> Blocks:
        """Rows of a matrix, or all of a vector, from each tensor that has some of them."""
        counts = [self._num_rows(tensor, place) for tensor in place.tensors]
        inputs = {self.gguf.shape(tensor)[-1] for tensor in place.tensors}
        has_expert = all((place.expert or 0) < self.gguf.shape(tensor)[0] for tensor in place.tensors)
        if sum(counts) != math.prod(shape[:-1]) or inputs != {shape[-1]} or not has_expert:
            raise self._wrong_shape(name, place, shape)
        first, end = (0, 1) if len(shape) == 1 else rows.indices(shape[0])[:2]
        found: Blocks = []
        for tensor, count in zip(place.tensors, counts, strict=True):
            part = range(min(max(first, 0), count), min(max(end, 0), count))
            found.append(self._read_rows(tensor, place, part))
            first, end = first - count, end - count
        return found

    def _num_rows(self, tensor: str, place: Place) -> int:
        """Rows of a tensor that belong to a place."""
        outer = self.gguf.shape(tensor)[:-1]
        count = math.prod(outer if place.expert is None else outer[1:])
        return count if place.half is None else count // 2

    def _read_rows(self, tensor: str, place: Place, rows: range) -> tuple[str, Tensor]:
        """The type and the bytes of some rows, which are counted within a place."""
        file, stored = self.gguf.tensors[tensor]
        row_bytes = stored.nbytes // math.prod(stored.shape[:-1])
        before = (place.expert or 0) * math.prod(stored.shape[1:-1]) + (place.half or 0) * self._num_rows(tensor, place)
        raw = torch.empty(len(rows), row_bytes, dtype=torch.uint8)
        file.stored.read_into(raw.numpy().reshape(-1).data, stored.start + (before + rows.start) * row_bytes)
        self.bytes_read += raw.nbytes
        return stored.dtype, raw

    def _read_by_head(self, name: str, place: Place, shape: tuple[int, ...]) -> Tensor:
        """The matrix from latents to keys and values `[H * (n + v), L]`; see `Place`."""
        sizes = [self.gguf.shape(tensor) for tensor in place.tensors]
        (heads, latent, nope), (_, value, _) = sizes if all(len(size) == 3 for size in sizes) else [(0, 0, 0)] * 2
        if sizes[1] != (heads, value, latent) or shape != (heads * (nope + value), latent):
            raise self._wrong_shape(name, place, shape)
        found = []
        for tensor, size in zip(place.tensors, sizes, strict=True):
            whole = Place((tensor,))
            dtype, raw = self._read_rows(tensor, whole, range(self._num_rows(tensor, whole)))
            found.append(values(dtype, raw, size[-1]).view(size))
        return torch.cat((found[0].transpose(1, 2), found[1]), dim=1).flatten(0, 1)

    def _wrong_shape(self, name: str, place: Place, shape: tuple[int, ...]) -> ValueError:
        have = ", ".join(f"{tensor!r} of shape {list(self.gguf.shape(tensor))}" for tensor in place.tensors)
        return ValueError(f"model: {self.gguf.path} has {have}, but its metadata means {name} of shape {list(shape)}")
