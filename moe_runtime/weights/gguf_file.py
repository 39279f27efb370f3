"""Files in the GGUF format, versions 2 and 3: their metadata, and where their tensors lie. No torch.

The format: magic, version, counts of tensors and metadata; keys and values of the metadata; names, sizes, types and
offsets of the tensors; then, aligned, the tensors' bytes. Numbers are little-endian. A model may be split over files.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moe_runtime.types.weight_format import Code, Scale, WeightFormat
from moe_runtime.weights.safetensors_file import MOST_HEADER, StoredTensor
from moe_runtime.weights.stored_file import StoredFile

GGUF_SUFFIX = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
CHUNK = 1 << 20  # bytes of a header that are read at once
MOST_DIMS = 4
DEFAULT_ALIGNMENT = 32
# By number: name, weights of a block, bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
# Types that are held in their codes, and all that can be read; see formats/gguf.py.
FORMATS = {
    "Q8_0": WeightFormat(Code.INT8, Scale.FLOAT16, 32),
    "Q5_0": WeightFormat(Code.INT8, Scale.FLOAT16, 32),
    "Q4_0": WeightFormat(Code.INT4, Scale.FLOAT16, 32),
    "Q4_1": WeightFormat(Code.UINT4, Scale.FLOAT16, 32, has_offset=True),
    "Q5_1": WeightFormat(Code.INT8, Scale.FLOAT16, 32, has_offset=True),
    "Q4_K": WeightFormat(Code.UINT4, Scale.INT8, 32, has_offset=True),
    "Q5_K": WeightFormat(Code.INT8, Scale.INT8, 32, has_offset=True),
    "Q6_K": WeightFormat(Code.INT8, Scale.INT8, 16),
    "MXFP4": WeightFormat(Code.FP4, Scale.E8M0, 32),
}
READABLE = ("F32", "F16", "BF16", *FORMATS)
# Types of values in the metadata, by number: their letters in `struct`.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
Value = TypeVar("Value")
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the plain model lies in a file.

    Attributes:
        tensors: of the file; their rows follow each other.
        expert: entry of the tensor's leading dimension; None: all of the tensor.
        half: of the expert's rows, if gate (0) and up (1) are one tensor.
        by_head: the tensors are latent attention's key matrices `[H, L, n]` and value matrices `[H, v, L]`. The plain
            tensor has a head's `n` rows of keys, then its `v` rows of values.
    """

    tensors: tuple[str, ...]
    expert: int | None = None
    half: int | None = None
    by_head: bool = False


class GgufFile:
    """One file and its header.

    Attributes:
        metadata: values by key. An array is a list. A float32 is the shortest decimal number that rounds to it.
        tensors: by name; dtype is the name in `TYPES`, the last dimension of a shape is contiguous.

    Raises:
        ValueError: the file cannot be opened, is no GGUF file, of another version, damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.stored = StoredFile(path)
            header = _Header(self.stored)
        except OSError as error:
            raise ValueError(f"model: {path} cannot be opened: {error.strerror}") from None
        _check_kind(path, header)
        try:
            num_tensors, num_values = header.number("Q"), header.number("Q")
            self.metadata = header.named(num_values, header.value)
            self.tensors = self._placed(header.named(num_tensors, header.tensor), header.position)
        except ValueError as error:
            raise ValueError(f"model: {path} is damaged or truncated: {error}") from None

    def _placed(self, tensors: dict[str, StoredTensor], header_size: int) -> dict[str, StoredTensor]:
        """The tensors, whose offsets count from the end of the header, with their places in the file."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its general.alignment is {alignment!r}, which is no power of two")
        total, first = self.stored.identity.size, -(-header_size // alignment) * alignment
        placed, end = {}, first
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            start = first + tensor.start
            if tensor.start % alignment or start < end:
                raise ValueError(f"tensor {name!r} is not aligned or overlaps another")
            end = start + tensor.nbytes
            if end > total:
                raise ValueError(f"tensor {name!r} ends at byte {end}, and the file has {total}")
            placed[name] = StoredTensor(tensor.dtype, tensor.shape, start, tensor.nbytes)
        return placed


class Gguf:
    """A model in one file or in the parts that llama.cpp's `gguf-split` writes.

    Args:
        path: the file, or any of the parts.

    Attributes:
        metadata: of the first part.
        tensors: of all parts: the part, and the place in it.

    Raises:
        ValueError: as `GgufFile`, or a part is missing or of another model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = [GgufFile(part) for part in _parts(path)]
        self.metadata = files[0].metadata
        self.tensors: dict[str, tuple[GgufFile, StoredTensor]] = {}
        for number, file in enumerate(files):
            found = file.metadata.get("split.no", 0), file.metadata.get("split.count", 0) or 1
            if found != (number, len(files)):
                raise ValueError(
                    f"model: {file.path} is part {found[0] + 1} of {found[1]} by its metadata; by its name, it must be "
                    f"{number + 1} of {len(files)}"
                )
            for name, tensor in file.tensors.items():
                if name in self.tensors:
                    raise ValueError(f"model: {file.path} has tensor {name!r}, which {self.tensors[name][0].path} has")
                self.tensors[name] = file, tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises ValueError if there is none."""
        if name not in self.tensors:
            raise ValueError(f"model: {self.path} has no tensor {name!r}")
        return self.tensors[name][1].shape

    def format_of(self, place: Place | None) -> WeightFormat | None:
        """How a matrix is stored; None: it is not quantised, or can only be read dequantised."""
        if place is None or place.by_head:
            return None
        formats = {FORMATS.get(self.tensors[name][1].dtype) for name in place.tensors}
        return formats.pop() if len(formats) == 1 else None


def _parts(path: Path) -> list[Path]:
    """All parts of a model, of which `path` is one. Raises ValueError if one is missing."""
    match = PART_NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise ValueError(f"model: {part} is missing; {path.name} is one of {count} parts")
    return parts


def _check_kind(path: Path, header: _Header) -> None:
    """Raise ValueError unless a file begins as a GGUF file of a known version."""
    start = header.take(8) if header.size >= 8 else b""
    if start[:4] != MAGIC:
        raise ValueError(f"model: {path} is no GGUF file")
    version = int.from_bytes(start[4:], "little")
    if version not in VERSIONS:
        is_big = int.from_bytes(start[4:], "big") in VERSIONS
        found = "big-endian numbers" if is_big else f"GGUF version {version}"
        raise ValueError(f"model: {path} has {found}; it must be little-endian and of version 2 or 3")


class _Header:
    """Reads a header value by value.

    Attributes:
        position: of the next value in the file.
        size: bytes that may be read.
    """

    def __init__(self, stored: StoredFile) -> None:
        self.position, self.size = 0, min(stored.identity.size, MOST_HEADER)
        self._stored, self._chunk, self._first = stored, b"", 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.size - self.position:
            raise ValueError(f"its header does not end within {self.size} bytes")
        start = self.position - self._first
        if start + count > len(self._chunk):
            length = min(max(count, CHUNK), self.size - self.position)
            self._chunk, self._first, start = self._stored.read(length, self.position), self.position, 0
        self.position += count
        return self._chunk[start : start + count]

    def number(self, letter: str) -> Any:
        """A number, by its letter in `struct`."""
        (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Any:
        """A value of the metadata, with its type before it."""
        kind = self.number("I")
        if kind == ARRAY:
            return self._array()
        if kind == TEXT:
            return self.text()
        value = self.number(_letter(kind))
        return float(str(np.float32(value))) if NUMBERS[kind] == "f" else value

    def _array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind == TEXT:
            return [self.text() for _ in range(count)]
        letter = _letter(kind)
        content = self.take(count * struct.calcsize(f"<{letter}"))
        return list(struct.unpack(f"<{count}{letter}", content))

    def tensor(self) -> StoredTensor:
        """Sizes, type and place of a tensor; `start` counts from the end of the header."""
        num_dims = self.number("I")
        if not 1 <= num_dims <= MOST_DIMS:
            raise ValueError(f"a tensor has {num_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(num_dims))[::-1]
        kind, start = self.number("I"), self.number("Q")
        if kind not in TYPES:
            raise ValueError(f"a tensor has type {kind}, which is not known")
        dtype, block, nbytes = TYPES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"a tensor of type {dtype} has shape {list(shape)}")
        return StoredTensor(dtype, shape, start, math.prod(shape) // block * nbytes)

    def named(self, count: int, read: Callable[[], Value]) -> dict[str, Value]:
        """`count` names, each with what `read` reads after it."""
        found: dict[str, Value] = {}
        for _ in range(count):
            name = self.text()
            if not name.isprintable():
                raise ValueError(f"it has the name {name!r}")
            if name in found:
                raise ValueError(f"it has {name!r} twice")
            found[name] = read()
        return found


def _letter(kind: int) -> str:
    if kind not in NUMBERS:
        raise ValueError(f"a value has type {kind}, which is not supported")
    return NUMBERS[kind]
