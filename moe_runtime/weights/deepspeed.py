"""Weights from a DeepSpeed-MoE checkpoint: a Hugging Face model whose sparse blocks are `deepspeed.moe.layer.MoE`.

Outside the sparse blocks, tensors have their Hugging Face names, perhaps all with one prefix. A sparse block
`model.layers.N.<any>` has `deepspeed_moe.gate.wg.weight` and, in the experts' files,
`deepspeed_moe.experts.deepspeed_experts.E.<name>.weight` for the three matrices of a SwiGLU. Files are read as plain
data (`weights_only`). The file with all weights but the experts' is memory-mapped; it is read only while loading. An
expert's file is read whole when one of its matrices is needed, perhaps while serving, and never mapped: a process that
touches a mapped page of a truncated file dies. Files must stay as they were when the checkpoint was opened.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_runtime.config.model import ModelConfig
from moe_runtime.system.pages import release_pages
from moe_runtime.weights.checkpoint import ALL_ROWS, PlainWeights
from moe_runtime.weights.deepspeed_files import DeepSpeedFiles
from moe_runtime.weights.stored_file import StoredFile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUTER = ".deepspeed_moe.gate.wg.weight"
# Spellings of (gate, up, down).
SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
BESIDE_THE_BLOCK = ("self_attn.", "input_layernorm.", "post_attention_layernorm.")


class DeepSpeedCheckpoint(PlainWeights):
    """A `WeightSource` that uses the family's Hugging Face names.

    Args:
        files: the checkpoint's files.
        config: parsed from its `config.json`.
        block: name of a sparse block within a layer, in Hugging Face checkpoints of the family.
        matrices: names of an expert's gate, up and down in such a block.

    Attributes:
        names: all tensors, by their names in a Hugging Face checkpoint of the family.
        bytes_read: bytes of all tensors read.

    Raises:
        ValueError: a file is missing, foreign, damaged or holds more than plain data, or tensors do not fit the model.
    """

    def __init__(self, files: DeepSpeedFiles, config: ModelConfig, block: str, matrices: tuple[str, str, str]) -> None:
        files.check(config)
        self.files, self.config = files, config
        self._stored = {name: StoredFile(files.folder / name) for name in files.names}
        self._block, self._matrices = block, matrices
        self.bytes_read = 0
        state = _load(files.model, mmap=True)
        self._tensors = _tensors_of(state, files.model)
        self._prefix = _prefix(self._tensors, files.model)
        self._check_experts(state.get("num_experts"))
        self._blocks = self._find_blocks()
        self._key_of = self._name_tensors()
        self._expert_of = self._name_experts()
        self._opened: tuple[Path, dict[str, Tensor]] | None = None

    @property
    def names(self) -> list[str]:
        return [*self._key_of, *self._expert_of]

    def has(self, name: str) -> bool:
        return name in self._key_of or name in self._expert_of

    def read(self, name: str, shape: tuple[int, ...], index: int | None = None, rows: slice = ALL_ROWS) -> Tensor:
        tensor, where = self._find(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"model: {where} has shape {list(tensor.shape)}, but config.json means {list(shape)}")
        return self._take((tensor if index is None else tensor[index])[rows], name)

    def release_all(self) -> None:
        """Nothing: a tensor is no part of a mapped file, and is freed with its last reference."""

    def read_any(self, name: str) -> Tensor:
        """A tensor of `names`, of any shape."""
        return self._take(self._find(name)[0], name)

    def _take(self, tensor: Tensor, name: str) -> Tensor:
        self.bytes_read += tensor.nbytes
        copy = tensor.clone()  # later writes of a training job to the file must not change it
        if name in self._key_of:  # mapped
            release_pages(tensor)
        return copy

    def _find(self, name: str) -> tuple[Tensor, str]:
        """A mapped tensor, and its location for messages."""
        if name in self._expert_of:
            row, expert, role = self._expert_of[name]
            file = self.files.expert(row, expert)
            if self._opened is None or self._opened[0] != file:
                self._opened = (file, self._open_expert(row, expert))
            tensors = self._opened[1]
            key = list(tensors)[role]
        elif name in self._key_of:
            file, tensors, key = self.files.model, self._tensors, self._key_of[name]
            self._stored[file.name].check()
        else:
            raise ValueError(f"model: {self.files.folder} has no tensor {name!r}")
        where = f"tensor {key!r} of {file}"
        if tensors[key].dtype not in DTYPES:
            known = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
            raise ValueError(f"model: {where} has dtype {tensors[key].dtype}, which is not supported ({known})")
        return tensors[key], where

    def _open_expert(self, row: int, expert: int) -> dict[str, Tensor]:
        """The tensors of an expert's file, in the order gate, up, down; the file must have no others."""
        file = self.files.expert(row, expert)
        self._stored[file.name].check()
        tensors = _only_tensors(_load(file, mmap=False), file)
        prefix = f"{self._blocks[row]}.deepspeed_moe.experts.deepspeed_experts.{expert}."
        for spelling in SPELLINGS:
            keys = [f"{prefix}{name}.weight" for name in spelling]
            if set(keys) == set(tensors):
                return {key: tensors[key] for key in keys}
        known = " or ".join(str(list(spelling)) for spelling in SPELLINGS)
        raise ValueError(f"model: {file} holds {sorted(tensors)}; it must hold the weights {known} below {prefix!r}")

    def _check_experts(self, num_experts: object) -> None:
        expected = [self.config.moe.num_experts] * len(self.config.moe_layers)
        if num_experts != expected:
            raise ValueError(
                f"model: {self.files.model} says num_experts {num_experts}, but config.json means {expected}"
            )

    def _find_blocks(self) -> list[str]:
        """Prefixes of the sparse blocks, in order of the layers."""
        found: dict[int, str] = {}
        pattern = re.compile(rf"({re.escape(self._prefix)}model\.layers\.(\d+)\..+?){re.escape(ROUTER)}")
        for key in self._tensors:
            if match := pattern.fullmatch(key):
                found[int(match[2])] = match[1]
        if sorted(found) != list(self.config.moe_layers):
            raise ValueError(
                f"model: {self.files.model} has DeepSpeed-MoE blocks (*{ROUTER}) in layers {sorted(found)}, but "
                f"config.json means layers {list(self.config.moe_layers)}"
            )
        return [found[layer] for layer in self.config.moe_layers]

    def _name_tensors(self) -> dict[str, str]:
        """Key in the model's file for each family tensor name; refuses tensors that a sparse layer can't have."""
        key_of = {}
        block_of = dict(zip(self.config.moe_layers, self._blocks, strict=True))
        for key in self._tensors:
            if not key.startswith(self._prefix):
                raise ValueError(f"model: {self.files.model} has tensor {key!r}, which is no part of the model")
            name = key.removeprefix(self._prefix)
            match = re.match(r"model\.layers\.(\d+)\.", name)
            layer = int(match[1]) if match else -1
            if match and layer in block_of and not name.removeprefix(match[0]).startswith(BESIDE_THE_BLOCK):
                if key != block_of[layer] + ROUTER:
                    raise ValueError(
                        f"model: {self.files.model} has tensor {key!r}, which is not supported in a sparse layer"
                    )
                name = f"model.layers.{layer}.{self._block}.gate.weight"
            key_of[name] = key
        return key_of

    def _name_experts(self) -> dict[str, tuple[int, int, int]]:
        """(sparse layer, expert, index into gate, up and down) by tensor name in the family."""
        return {
            f"model.layers.{layer}.{self._block}.experts.{expert}.{part}.weight": (row, expert, role)
            for row, layer in enumerate(self.config.moe_layers)
            for expert in range(self.config.moe.num_experts)
            for role, part in enumerate(self._matrices)
        }


def _load(file: Path, mmap: bool) -> dict[str, Any]:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"model: {file} is damaged or truncated: it is no whole archive of torch.save")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"model: {file} holds more than tensors and plain values"
            f"{f' ({what[1]})' if what else ''}; it is not read. Save it without client_state"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"model: {file} is damaged or truncated: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"model: {file} does not hold a state of DeepSpeed")
    return content


def _tensors_of(state: dict[str, Any], file: Path) -> dict[str, Tensor]:
    module = state.get("module")
    if not isinstance(module, dict):
        raise ValueError(f"model: {file} has no 'module'; it is no model state of DeepSpeed")
    return _only_tensors(module, file)


def _only_tensors(state: dict[str, Any], file: Path) -> dict[str, Tensor]:
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"model: {file} has {key!r}, which is no tensor")
    return state


def _prefix(tensors: dict[str, Tensor], file: Path) -> str:
    """The prefix before `model.` in all names: empty, unless a training script has wrapped the model."""
    found = [key for key in tensors if key.endswith("model.embed_tokens.weight")]
    if len(found) != 1:
        raise ValueError(f"model: {file} must have one tensor '*model.embed_tokens.weight', it has {found}")
    return found[0].removesuffix("model.embed_tokens.weight")
