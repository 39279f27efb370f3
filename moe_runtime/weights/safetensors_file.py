"""A file in the safetensors format: its header, and its tensors' bytes. No torch.

The format: 8 bytes with the header's size N (little-endian), N bytes of JSON, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.weights.stored_file import StoredFile

MOST_HEADER = 100_000_000  # bytes, as in the reference implementation
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
BITS |= {"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64}
BITS |= {"C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: dtype as the file names it, first byte in the file, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """A file and its header.

    Attributes:
        tensors: by name.

    Raises:
        ValueError: the file cannot be opened, is damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.stored = StoredFile(path)
            self.tensors = self._read_header()
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"model: {path} is damaged or truncated: {error}") from None

    def _read_header(self) -> dict[str, StoredTensor]:
        total = self.stored.identity.size
        size = int.from_bytes(self.stored.read(8, 0), "little") if total >= 8 else total
        if not 2 <= size <= min(MOST_HEADER, total - 8):
            raise ValueError("it has no whole header")
        header = json.loads(self.stored.read(size, 8))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        first = 8 + size
        tensors = {name: _entry(name, entry, first) for name, entry in header.items() if name != "__metadata__"}
        end = first
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if tensor.start != end:
                raise ValueError(f"its tensors overlap or leave a gap before {name!r}")
            end += tensor.nbytes
        if end != total:
            raise ValueError(f"its header describes {end} bytes, and it has {total}")
        return tensors


def _entry(name: str, entry: Any, first: int) -> StoredTensor:
    """A tensor's entry in the header; its offsets count from byte `first` of the file."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        nbytes = math.prod(shape) * BITS[dtype] // 8
        good = min((*shape, start)) >= 0 and end - start == nbytes
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"its header has a wrong entry for {name!r}")
    return StoredTensor(dtype, shape, first + start, nbytes)


def stored_dtype(folder: Path) -> str | None:
    """The dtype of the embedding in a folder's files, as configurations name it; None if no file has an embedding.

    A damaged file is passed over: whoever reads the weights names it.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors = SafetensorsFile(path).tensors
        except ValueError:
            continue
        for name, tensor in tensors.items():
            if name.endswith("embed_tokens.weight"):
                return DTYPE_NAMES.get(tensor.dtype)
    return None
