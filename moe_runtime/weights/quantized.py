"""Weights of a quantised checkpoint: safetensors files, read as a scheme says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.types.weight_format import WeightFormat
from moe_runtime.weights.checkpoint import ALL_ROWS, READABLE, Checkpoint
from moe_runtime.weights.formats.fp4 import read_mxfp4, read_nvfp4
from moe_runtime.weights.formats.integers import (
    dequantize_gptq,
    is_act_ordered,
    read_awq,
    read_gptq,
    read_packed,
    stored_format,
)
from moe_runtime.weights.formats.scaled import read_scaled
from moe_runtime.weights.formats.stored import StoredRows
from moe_runtime.weights.scheme import Layout, Scheme, Storage, part_name

Read = Callable[[StoredRows, Storage], Tensor | QuantizedMatrix]

READERS: dict[Layout, Callable[[StoredRows, Storage], QuantizedMatrix]] = {
    Layout.SCALED: read_scaled,
    Layout.PACKED: read_packed,
    Layout.MXFP4: read_mxfp4,
    Layout.MXFP4_BLOCKS: read_mxfp4,
    Layout.NVFP4: read_nvfp4,
    Layout.NVFP4_DIVIDED: read_nvfp4,
    Layout.AWQ: read_awq,
    Layout.GPTQ: read_gptq,
    Layout.GPTQ_V2: read_gptq,
}
GPTQ = {Layout.GPTQ, Layout.GPTQ_V2}
READ_WHOLE = {Layout.AWQ, *GPTQ}  # rows of the matrix are columns in the file
NOTHING: tuple[tuple[str, int | None], Tensor | QuantizedMatrix] = ("", None), torch.empty(0)


class QuantizedCheckpoint:
    """A `WeightSource`: a checkpoint and the scheme of its configuration.

    A tensor that is stored as float32 or in 16 bits is not quantised, whatever the scheme says.
    """

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme) -> None:
        self._checkpoint, self._scheme = checkpoint, scheme
        self._is_act_ordered: dict[str, bool] = {}
        self._last = NOTHING

    @property
    def bytes_read(self) -> int:
        """Bytes of all tensors read."""
        return self._checkpoint.bytes_read

    def has(self, name: str) -> bool:
        return self._checkpoint.has(name) or self._storage_of(name) is not None

    def format_of(self, name: str) -> WeightFormat | None:
        storage = self._storage_of(name)
        if storage is None or self._is_only_dequantized(name, storage):
            return None
        return stored_format(self._checkpoint, name, storage)

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS) -> Tensor:
        storage = self._storage_of(name)
        if storage is None:
            return self._checkpoint.read(name, shape, index, rows)
        if not self._is_only_dequantized(name, storage):
            return self.read_quantized(name, shape, index, rows).dequantize()
        weight_NK = self._whole(dequantize_gptq, storage, name, shape, index)
        assert isinstance(weight_NK, Tensor)
        return weight_NK[rows]

    def read_quantized(
        self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS
    ) -> QuantizedMatrix:
        storage = self._storage_of(name)
        assert storage is not None and not self._is_only_dequantized(name, storage)
        read = READERS[storage.layout]
        if storage.layout not in READ_WHOLE:
            return read(StoredRows.of(self._checkpoint, name, shape, index, rows), storage)
        matrix = self._whole(read, storage, name, shape, index)
        assert isinstance(matrix, QuantizedMatrix)
        return matrix.rows(rows)

    def release_all(self) -> None:
        self._last = NOTHING
        self._checkpoint.release_all()

    def _whole(
        self, read: Read, storage: Storage, name: str, shape: tuple[int, ...], index: int | None
    ) -> Tensor | QuantizedMatrix:
        """A matrix that cannot be read in rows; the last one is kept, because pieces of it may follow."""
        if self._last[0] != (name, index):
            self._last = NOTHING  # frees it first
            self._last = (name, index), read(StoredRows.of(self._checkpoint, name, shape, index, ALL_ROWS), storage)
        return self._last[1]

    def _storage_of(self, name: str) -> Storage | None:
        """How a tensor is stored; None if it is as in a checkpoint without quantisation, or absent."""
        storage = self._scheme.storage_of(name)
        if storage is None or not self._checkpoint.has(part_name(name, storage.codes)):
            return None
        return None if self._checkpoint.stored(part_name(name, storage.codes)).dtype in READABLE else storage

    def _is_only_dequantized(self, name: str, storage: Storage) -> bool:
        if storage.layout not in GPTQ:
            return False
        if name not in self._is_act_ordered:
            self._is_act_ordered[name] = is_act_ordered(self._checkpoint, name, storage)
        return self._is_act_ordered[name]
