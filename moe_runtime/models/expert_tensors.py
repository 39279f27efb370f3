"""Where the matrices and biases of an expert are in a checkpoint: stored one by one, or fused in one tensor per layer.

Shape suffixes: D hidden, F intermediate, E logical experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.config.model import ModelConfig
from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.models.names import SwiGLUNames, TensorNames
from moe_runtime.weights.checkpoint import WeightSource

Kept = dict[str, Tensor | QuantizedMatrix]  # tensors of an expert that were read whole, by name


@dataclass(frozen=True)
class StoredPart:
    """A matrix or a bias of a SwiGLU: outputs `first`, `first + step`, ... of a tensor, or of entry `index` of one.

    Attributes:
        num_rows: outputs.
        transposed: the tensor has inputs by outputs, else outputs by inputs.
    """

    name: str
    shape: tuple[int, ...]
    num_rows: int
    first: int = 0
    step: int = 1
    index: int | None = None
    transposed: bool = False

    @property
    def is_bias(self) -> bool:
        return len(self.shape if self.index is None else self.shape[1:]) == 1

    @property
    def num_inputs(self) -> int:
        """Inputs of a matrix; 1 for a bias."""
        entry = self.shape if self.index is None else self.shape[1:]
        return 1 if self.is_bias else entry[0 if self.transposed else 1]

    def read(self, source: WeightSource, rows: range, kept: Kept) -> Tensor:
        """Some of its outputs, `[rows, inputs]` or `[rows]`.

        If outputs are not adjacent in the tensor, it is read whole. `kept` holds it for the parts and pieces of the
        same expert that follow.
        """
        start, end = self._span(rows)
        if not self.transposed and self.step == 1:
            return source.read(self.name, self.shape, self.index, slice(start, end))
        if self.name not in kept:
            kept.clear()
            kept[self.name] = source.read(self.name, self.shape, self.index)
        whole = kept[self.name]
        assert isinstance(whole, Tensor)
        return (whole.T if self.transposed else whole)[start : end : self.step].contiguous()

    def read_quantized(self, source: WeightSource, rows: range, kept: Kept) -> QuantizedMatrix:
        """As `read`, of a matrix that is stored quantised."""
        assert not self.transposed
        start, end = self._span(rows)
        if self.step == 1:
            return source.read_quantized(self.name, self.shape, self.index, slice(start, end))
        if self.name not in kept:
            kept.clear()
            kept[self.name] = source.read_quantized(self.name, self.shape, self.index)
        whole = kept[self.name]
        assert isinstance(whole, QuantizedMatrix)
        return whole.rows(torch.arange(start, end, self.step))

    def _span(self, rows: range) -> tuple[int, int]:
        """Where its outputs `rows` begin and end in the tensor."""
        return self.first + self.step * rows.start, self.first + self.step * (rows.stop - 1) + 1


@dataclass(frozen=True)
class ExpertTensors:
    """Finds the tensors of experts; all names are full names."""

    config: ModelConfig
    names: TensorNames
    source: WeightSource

    def sparse(self, index: int) -> str:
        """The sparse block's prefix: the family's own, or the one that newer checkpoints of all families use."""
        layer = self.names.layer.format(index)
        prefix = f"{layer}.{self.names.sparse}"
        return prefix if self.source.has(f"{prefix}.{self.names.gate}") else f"{layer}.{self.names.dense}"

    def expert(self, index: int, expert: int) -> Iterator[tuple[ExpertPart, StoredPart]]:
        """The parts of one logical expert of a layer."""
        fused = self._fused_names(index)
        if fused is not None:
            yield from self._fused(fused, expert)
            return
        prefix = f"{self.sparse(index)}.{self.names.expert.format(expert)}"
        yield from self.swiglu(prefix, self.names.expert_parts, self.config.moe.intermediate_size)
        if self.config.moe.expert_bias:
            yield from self._biases(prefix)

    def swiglu(self, prefix: str, parts: SwiGLUNames, inner: int) -> Iterator[tuple[ExpertPart, StoredPart]]:
        """The three matrices of a SwiGLU that are stored under `prefix`."""
        hidden = self.config.hidden_size
        if parts.gate_up:
            name, shape = f"{prefix}.{parts.gate_up}.weight", (2 * inner, hidden)
            yield "gate", StoredPart(name, shape, inner)
            yield "up", StoredPart(name, shape, inner, inner)
        else:
            yield "gate", StoredPart(f"{prefix}.{parts.gate}.weight", (inner, hidden), inner)
            yield "up", StoredPart(f"{prefix}.{parts.up}.weight", (inner, hidden), inner)
        yield "down", StoredPart(f"{prefix}.{parts.down}.weight", (hidden, inner), hidden)

    def _biases(self, prefix: str) -> Iterator[tuple[ExpertPart, StoredPart]]:
        hidden, inner, parts = self.config.hidden_size, self.config.moe.intermediate_size, self.names.expert_parts
        yield "gate_bias", StoredPart(f"{prefix}.{parts.gate}.bias", (inner,), inner)
        yield "up_bias", StoredPart(f"{prefix}.{parts.up}.bias", (inner,), inner)
        yield "down_bias", StoredPart(f"{prefix}.{parts.down}.bias", (hidden,), hidden)

    def _fused(self, fused: tuple[str, str], expert: int) -> Iterator[tuple[ExpertPart, StoredPart]]:
        """The parts of an expert within tensors of all experts, `[E, 2F, D]` and `[E, D, F]`, or both transposed.

        Quantised ones are never transposed.
        """
        hidden, moe = self.config.hidden_size, self.config.moe
        turned = self.names.fused_is_transposed and self.source.format_of(fused[0]) is None
        inner, total = moe.intermediate_size, moe.num_experts
        first_up, step = (1, 2) if self.names.fused_is_interleaved else (inner, 1)
        gate_up, down = fused
        shape = (total, hidden, 2 * inner) if turned else (total, 2 * inner, hidden)
        yield "gate", StoredPart(gate_up, shape, inner, 0, step, expert, turned)
        yield "up", StoredPart(gate_up, shape, inner, first_up, step, expert, turned)
        shape = (total, inner, hidden) if turned else (total, hidden, inner)
        yield "down", StoredPart(down, shape, hidden, 0, 1, expert, turned)
        if moe.expert_bias:
            yield "gate_bias", StoredPart(f"{gate_up}_bias", (total, 2 * inner), inner, 0, step, expert)
            yield "up_bias", StoredPart(f"{gate_up}_bias", (total, 2 * inner), inner, first_up, step, expert)
            yield "down_bias", StoredPart(f"{down}_bias", (total, hidden), hidden, 0, 1, expert)

    def _fused_names(self, index: int) -> tuple[str, str] | None:
        """Names of all experts' matrices in one tensor: the family's own, or those that newer checkpoints of all
        families use; None if experts are stored one by one."""
        names, layer, sparse = self.names, self.names.layer.format(index), self.sparse(index)
        own = [(f"{layer}.{names.fused_gate_up}", f"{layer}.{names.fused_down}")] if names.fused_gate_up else []
        usual = [(f"{sparse}.experts.gate_up_proj{end}", f"{sparse}.experts.down_proj{end}") for end in ("", ".weight")]
        return next((pair for pair in (*own, *usual) if self.source.has(pair[0])), None)
