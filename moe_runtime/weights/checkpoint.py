"""Sources of weights: a directory of safetensors files, or random numbers.

Files are memory-mapped, so each rank reads only the tensors that it needs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_runtime.system.pages import give_freed_memory_back, release_mappings, release_pages

READABLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DUMMY_STD = 0.02


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The directory of a model: the embedded "demo", a local directory, or a hub id that is downloaded.

    Without `weights`, only the configuration and the tokenizer are downloaded.

    Raises:
        ValueError: it is no directory, and the hub can't provide it.
    """
    if model == "demo":
        from moe_runtime.demo.checkpoint import ensure_demo_model

        return ensure_demo_model()
    path = Path(model).expanduser()
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        if not path.is_dir():
            raise ValueError(f'model: {model!r} is no directory; give a checkpoint directory, a hub id or "demo"')
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.jinja", "*.txt"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model: {model!r} is no directory, and the hub does not give it: {reason}") from error


class WeightSource(Protocol):
    """Gives tensors by name. `index` picks one entry of the leading dimension, whose size is `shape[0]`."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None) -> Tensor:
        """The tensor, of the expected shape (`shape[1:]` with an index). Raises ValueError naming what is wrong."""

    def release(self, tensor: Tensor) -> None:
        """Release the memory of a tensor from `read`, or of a part of it, after its last use."""

    def release_all(self) -> None:
        """Release all memory that can be read again; tensors in use keep their values."""


class Checkpoint:
    """A directory with `model.safetensors`, or several files and `model.safetensors.index.json`.

    Attributes:
        bytes_read: bytes of all tensors read.

    Raises:
        ValueError: there are no weights, a file of the index is missing, or a file is damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self._file_of: dict[str, str] = {}
        index = path / "model.safetensors.index.json"
        if index.exists():
            self._file_of = _weight_map(index)
            files = sorted(set(self._file_of.values()))
        else:
            files = sorted(file.name for file in path.glob("*.safetensors"))
            if not files:
                raise ValueError(f"model: {path} holds no .safetensors file")
        self._handles = {file: self._open(file) for file in files}
        if not index.exists():
            self._file_of = {name: file for file, handle in self._handles.items() for name in handle.keys()}  # noqa: SIM118

    def has(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None) -> Tensor:
        if name not in self._file_of:
            raise ValueError(f"model: {self.path} has no tensor {name!r}")
        file = self._file_of[name]
        try:
            part = self._handles[file].get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"model: {self.path / file} cannot give tensor {name!r}: {error}") from None
        if tuple(part.get_shape()) != shape:
            raise ValueError(
                f"model: tensor {name!r} has shape {part.get_shape()}, but config.json means {list(shape)}"
            )
        if part.get_dtype() not in READABLE:
            known = list(READABLE)
            raise ValueError(f"model: tensor {name!r} has dtype {part.get_dtype()}, which is not supported ({known})")
        tensor: Tensor = part[:] if index is None else part[index]
        self.bytes_read += tensor.nbytes
        return tensor

    def release(self, tensor: Tensor) -> None:
        release_pages(tensor)

    def release_all(self) -> None:
        release_mappings(self.path / file for file in self._handles)

    def _open(self, name: str) -> safe_open:
        file = self.path / name
        if not file.exists():
            raise ValueError(f"model: {file} is missing, but model.safetensors.index.json names it")
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model: {file} is damaged or truncated: {error}") from None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"model: {index} is no index of weights; it must hold a JSON object 'weight_map'") from None


class RandomWeights:
    """`load_format="dummy"`: reproducible random weights that depend on the tensor's name and the seed alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def has(self, name: str) -> bool:
        return ".experts.gate_up_proj" not in name

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{name}/{index}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        tensor = torch.empty(shape if index is None else shape[1:]).normal_(0.0, DUMMY_STD, generator=generator)
        return 1.0 + tensor if name.endswith("norm.weight") else tensor

    def release(self, tensor: Tensor) -> None:
        """Nothing: the tensor is freed with its last reference."""

    def release_all(self) -> None:
        """Return freed memory to the system: it stays in the heap because kept tensors are in between."""
        give_freed_memory_back()
