"""Writes a checkpoint with quantised weights, from one without. Names are those of the plain model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from moe_runtime.config.model import ModelConfig
from moe_runtime.kernels.quantized import quantize
from moe_runtime.models.expert_tensors import ExpertTensors, StoredPart
from moe_runtime.models.names import SwiGLUNames, TensorNames
from moe_runtime.types.weight_format import WeightFormat
from moe_runtime.weights.checkpoint import INDEX, Checkpoint
from moe_runtime.weights.compressed_writer import ShardWriter, compressed, settings

KEPT_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
# Maps that are never quantised, as patterns of compressed-tensors.
NEVER = tuple(rf"re:.*\.{name}$" for name in ("gate", "router", "shared_expert_gate", "kv_b_proj", "embed_tokens"))
WITHOUT = {"experts": r"re:.*\.(mlp|experts|block_sparse_moe|shared_mlp)\..*", "attention": r"re:.*\.self_attn\..*"}

Written = tuple[str, StoredPart, WeightFormat | None]  # its name there, where it is now, and its format there


@dataclass(frozen=True)
class QuantizedWriter:
    """A checkpoint, and how its matrices are to be written.

    Args:
        path: the checkpoint's folder.
        config: with the formats of its parts; see `config.quantization.quantized`.
        names: of the family.
    """

    path: Path
    config: ModelConfig
    names: TensorNames

    @cached_property
    def source(self) -> Checkpoint:
        return Checkpoint(self.path)

    def inputs(self) -> set[int]:
        """Inputs of the matrices that are quantised."""
        written = (each for index in range(self.config.num_layers) for each in self._layer(index))
        found = {stored.shape[-1] for _, stored, format in written if format is not None}
        return found | ({self.config.hidden_size} if self.config.head_format is not None else set())

    def write(self, out: Path, format: WeightFormat, progress: Callable[[], object]) -> int:
        """Write into the empty folder `out`; calls `progress` after every layer. Returns the bytes of all tensors.

        Raises:
            ValueError: as reading the checkpoint, or weights are NaN or infinite.
        """
        writer, done = ShardWriter(out), set[str]()
        for index in range(self.config.num_layers):
            for name, stored, held in self._layer(index):
                rows, done = range(stored.num_rows), done | {stored.name}
                tensor = stored.read(self.source, rows, {})
                _add(writer, name, tensor, held)
            progress()
        tied = self.config.tie_word_embeddings
        if self.config.head_format is not None:
            head = self.names.embedding if tied else self.names.head
            tensor = self.source.read(head, (self.config.vocab_size, self.config.hidden_size))
            _add(writer, self.names.head, tensor, self.config.head_format)
            done |= {self.names.head}
        for name in self.source.names - done:
            writer.add(name, self.source.read(name, self.source.stored(name).shape))
        writer.close()
        self._write_config(out, format)
        return writer.total

    def _write_config(self, out: Path, format: WeightFormat) -> None:
        for pattern in KEPT_FILES:
            for file in self.path.glob(pattern):
                if file.name not in (INDEX, "config.json"):
                    shutil.copy(file, out)
        content = json.loads((self.path / "config.json").read_text())
        content["quantization_config"] = settings(format, [*NEVER, *self._left_out()])
        if self.config.head_format is not None:
            content["tie_word_embeddings"] = False
        (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")

    def _left_out(self) -> list[str]:
        formats = self.config.layers[self.config.moe_layers[0]].formats
        held = {"experts": formats.experts.output, "attention": formats.attention.output}
        parts = [pattern for part, pattern in WITHOUT.items() if held[part] is None]
        return parts + ["lm_head"] * (self.config.head_format is None)

    def _layer(self, index: int) -> Iterator[Written]:
        """What is written in another way than it is stored."""
        layer, prefix = self.config.layers[index], self.names.layer.format(index)
        if layer.formats.attention.output is not None:
            for name, outputs, inputs in self.names.projections(layer.attention, self.config.hidden_size):
                full = f"{prefix}.{name}.weight"
                yield full, StoredPart(full, (outputs, inputs), outputs), layer.formats.attention.output
        mlp, experts = layer.formats.mlp.output, layer.formats.experts.output  # all matrices have one format
        if mlp is not None:
            if not layer.is_sparse:
                size = layer.dense_intermediate_size or 0
                yield from self._swiglu(f"{prefix}.{self.names.dense}", self.names.dense_parts, size, mlp)
            elif self.config.moe.shared_intermediate_size:
                shared, size = f"{prefix}.{self.names.shared}", self.config.moe.shared_intermediate_size
                yield from self._swiglu(shared, self.names.shared_parts, size, mlp)
        if layer.is_sparse and experts is not None:
            yield from self._experts(index, experts)

    def _swiglu(self, prefix: str, parts: SwiGLUNames, inner: int, format: WeightFormat) -> Iterator[Written]:
        hidden = self.config.hidden_size
        up_rows = 2 * inner // len(parts.up_matrices)
        for part, outputs, inputs in (
            *((part, up_rows, hidden) for part in parts.up_matrices),
            (parts.down, hidden, inner),
        ):
            name = f"{prefix}.{part}.weight"
            yield name, StoredPart(name, (outputs, inputs), outputs), format

    def _experts(self, index: int, format: WeightFormat) -> Iterator[Written]:
        """All experts of a layer, one by one."""
        tensors = ExpertTensors(self.config, self.names, self.source)
        parts = self.names.expert_parts
        for expert in range(self.config.moe.num_experts):
            prefix = f"{tensors.sparse(index)}.{self.names.expert.format(expert)}"
            listed = dict(tensors.expert(index, expert))
            if listed["gate"].index is None and parts.gate_up:
                yield from self._swiglu(prefix, parts, self.config.moe.intermediate_size, format)
                continue
            for role, stored in listed.items():
                part, _, bias = role.partition("_")
                end = "bias" if bias else "weight"
                yield f"{prefix}.{getattr(parts, part)}.{end}", stored, None if bias else format


def _add(writer: ShardWriter, name: str, tensor: Tensor, format: WeightFormat | None) -> None:
    """Add a tensor as it is, or a matrix as the tensors of its quantised form."""
    if format is None:
        writer.add(name, tensor)
        return
    if not tensor.isfinite().all():
        raise ValueError(f"model: tensor {name!r} is damaged: it has weights that are NaN or infinite")
    for end, part in compressed(quantize(tensor, format)).items():
        writer.add(name.removesuffix("weight") + end, part)
