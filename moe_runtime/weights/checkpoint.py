"""Sources of weights: a directory of safetensors files, or random numbers.

A rank reads only the tensors that it needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.system.pages import give_freed_memory_back
from moe_runtime.types.weight_format import WeightFormat
from moe_runtime.weights.gguf_file import GGUF_SUFFIX
from moe_runtime.weights.safetensors_file import SafetensorsFile, StoredTensor

logger = logging.getLogger(__name__)

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
READABLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DUMMY_STD = 0.02
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head."
USUAL_PREFIX = "model."
PREFIXES = (USUAL_PREFIX, "model.language_model.", "language_model.model.", "")
ALL_ROWS = slice(None)
NOTHING: tuple[tuple[str, int | None], Tensor] = ("", None), torch.empty(0)


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The directory of a model: the embedded "demo", a local directory, or a hub id that is downloaded. Or a GGUF file.

    Without `weights`, only the configuration and the tokenizer are downloaded.

    Raises:
        ValueError: it is no directory or GGUF file, and the hub can't provide it.
    """
    if model == "demo":
        from moe_runtime.demo.checkpoint import ensure_demo_model

        return ensure_demo_model()
    path = Path(model).expanduser()
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return path
    if path.exists() or path.suffix == GGUF_SUFFIX or model.startswith((".", "/", "~")) or model.count("/") != 1:
        if not path.is_dir():
            raise ValueError(
                f"model: {model!r} is no directory or GGUF file; give a checkpoint directory, a .gguf file, a hub id "
                'or "demo"'
            )
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
    """Gives tensors by name. The memory of a tensor is its own, and is freed with its last reference."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS) -> Tensor:
        """A tensor or a part of it; a quantised one is dequantised to float32.

        Args:
            shape: of the whole tensor.
            index: picks one entry of the leading dimension.
            rows: of the tensor, or of that entry; a slice without a step.

        Raises:
            ValueError: there is no such tensor, it has another shape or dtype, or its file has changed.
        """

    def format_of(self, name: str) -> WeightFormat | None:
        """How a matrix is quantised; None: it is not, or it is only read dequantised."""

    def read_quantized(
        self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS
    ) -> QuantizedMatrix:
        """A matrix that `format_of` gives a format of, or some of its rows. Arguments and errors as of `read`."""

    def release_all(self) -> None:
        """Return to the system what was freed since the last call."""


class PlainWeights:
    """What sources have in common in which nothing is quantised."""

    def format_of(self, name: str) -> WeightFormat | None:
        return None

    def read_quantized(
        self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS
    ) -> QuantizedMatrix:
        raise AssertionError(f"{name} is not quantised")


class Checkpoint(PlainWeights):
    """The weights in safetensors files of a directory.

    If there is a `model.safetensors.index.json`, it names the files. Else `model.safetensors` alone counts. Without it,
    all `.safetensors` files count, and no tensor may be in two of them. Other files are ignored; a log line names them.

    Attributes:
        bytes_read: bytes of all tensors read.

    Raises:
        ValueError: there are no weights, a file of the index is missing, or a file is damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        present = sorted(file.name for file in path.glob("*.safetensors"))
        index = path / INDEX
        listed = _weight_map(index) if index.exists() else None
        if listed is not None:
            names = sorted(set(listed.values()))
        else:
            names = [SINGLE_FILE] if SINGLE_FILE in present else present
        if not names:
            raise ValueError(f"model: {path} holds no .safetensors file")
        if ignored := sorted(set(present) - set(names)):
            logger.info("model: ignored in %s, as they are not the model's: %s", path, ", ".join(ignored))
        files = {name: self._open(name) for name in names}
        file_of = _files_of(files, path) if listed is None else {key: files[listed[key]] for key in listed}
        self._place_of = {name: (file_of[key], key) for name, key in decoder_names(file_of).items()}

    @property
    def names(self) -> set[str]:
        """Of all tensors, as in a checkpoint of the language model alone."""
        return set(self._place_of)

    def has(self, name: str) -> bool:
        return name in self._place_of

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS) -> Tensor:
        return self.read_stored(name, READABLE, shape, index, rows)

    def stored(self, name: str) -> StoredTensor:
        """What the header of its file says of a tensor. Raises ValueError if there is no such tensor."""
        file, key = self._find(name)
        return file.tensors[key]

    def read_stored(
        self,
        name: str,
        dtypes: Mapping[str, torch.dtype],
        shape: tuple[int, ...],
        index: int | None = None,
        rows: slice = ALL_ROWS,
    ) -> Tensor:
        """As `read`, for a tensor of one of `dtypes`, which are named as in files."""
        file, key = self._find(name)
        found = file.tensors[key]
        if found.dtype not in dtypes:
            known = list(dtypes)
            raise ValueError(f"model: tensor {key!r} has dtype {found.dtype}, which is not supported ({known})")
        if found.shape != shape:
            have, want = list(found.shape), list(shape)
            raise ValueError(f"model: tensor {key!r} has shape {have}, but config.json means {want}")
        start, nbytes = found.start, found.nbytes
        if index is not None:
            shape, nbytes = shape[1:], nbytes // shape[0]
            start += index * nbytes
        if not shape:
            shape = (1,)  # of a number
        first, end, _ = rows.indices(shape[0])
        row_bytes = nbytes // shape[0]
        content = torch.empty((end - first) * row_bytes, dtype=torch.uint8)
        file.stored.read_into(content.numpy().data, start + first * row_bytes)
        self.bytes_read += content.nbytes
        return content.view(dtypes[found.dtype]).view(end - first, *shape[1:])

    def release_all(self) -> None:
        """Return freed memory to the system."""
        give_freed_memory_back()

    def _find(self, name: str) -> tuple[SafetensorsFile, str]:
        """The file of a tensor, and its name there."""
        if name not in self._place_of:
            raise ValueError(f"model: {self.path} has no tensor {name!r}")
        file, key = self._place_of[name]
        if key not in file.tensors:
            raise ValueError(f"model: {file.path} has no tensor {key!r}, but model.safetensors.index.json says so")
        return file, key

    def _open(self, name: str) -> SafetensorsFile:
        file = self.path / name
        if not file.exists():
            raise ValueError(f"model: {file} is missing, but model.safetensors.index.json names it")
        return SafetensorsFile(file)


def decoder_names(keys: Collection[str]) -> dict[str, str]:
    """The name in a checkpoint for each name in a checkpoint of the language model alone.

    They differ where the model is part of a larger one, for example beside a vision tower, or was saved without its
    head's class.
    """
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}{EMBEDDING}" in keys), USUAL_PREFIX)
    if prefix == USUAL_PREFIX:
        return {key: key for key in keys}
    names = {f"{USUAL_PREFIX}{key.removeprefix(prefix)}": key for key in keys if key.startswith(prefix)}
    for outer in ("language_model.", ""):
        names |= {key.removeprefix(outer): key for key in keys if key.startswith(f"{outer}{HEAD}")}
    rest = sorted(set(keys) - set(names.values()))
    if rest:
        logger.info("model: %d tensors that are no part of the language model are not read, as %s", len(rest), rest[0])
    return names


def _files_of(files: dict[str, SafetensorsFile], path: Path) -> dict[str, SafetensorsFile]:
    """The file of each tensor. Raises ValueError if two files have one."""
    found: dict[str, SafetensorsFile] = {}
    for name, file in files.items():
        for key in file.tensors:
            if key in found:
                raise ValueError(f"model: {path} has tensor {key!r} twice, in {found[key].path.name} and {name}")
            found[key] = file
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return {str(key): str(file) for key, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"model: {index} is no index of weights; it must hold a JSON object 'weight_map'") from None


class RandomWeights(PlainWeights):
    """`load_format="dummy"`: reproducible random weights that depend on the tensor's name and the seed alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._last = NOTHING  # the last tensor, which may be read in pieces

    def has(self, name: str) -> bool:
        return ".experts.gate_up_proj" not in name

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS) -> Tensor:
        if (name, index) != self._last[0]:
            self._last = NOTHING  # frees it first
            self._last = (name, index), self._make(name, shape if index is None else shape[1:], index)
        return self._last[1][rows]

    def release_all(self) -> None:
        """Return freed memory to the system: it stays in the heap because kept tensors are in between."""
        self._last = NOTHING
        give_freed_memory_back()

    def _make(self, name: str, shape: tuple[int, ...], index: int | None) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{name}/{index}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        tensor = torch.empty(shape).normal_(0.0, DUMMY_STD, generator=generator)
        return 1.0 + tensor if name.endswith("norm.weight") else tensor
