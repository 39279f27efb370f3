"""Reads a decoder from a checkpoint, tensor by tensor, into the parts of a kit.

Shape suffixes: D hidden, F intermediate, V vocabulary, E logical experts, W ranks, S slots per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher
from moe_runtime.balancer.placement import Placement
from moe_runtime.config.limits import Limits
from moe_runtime.config.model import ModelConfig
from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels.weight_format import PANEL
from moe_runtime.layers.capacity import LayerLimits
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.kit import MLP, AttentionBlock, DecoderLayer, Experts, Kit, Linear, MLPBlock, Norm, SparseBlock
from moe_runtime.layers.moe import ExpertCounter
from moe_runtime.layers.rotary import RotaryEmbedding
from moe_runtime.models.names import SwiGLUNames, TensorNames
from moe_runtime.weights.checkpoint import WeightSource

WHOLE = 1 << 62  # piece size in bytes that means "in one piece"


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix of a SwiGLU in the source: rows from `first` on of a tensor, or of entry `index` of one."""

    name: str
    shape: tuple[int, ...]
    num_rows: int
    first: int = 0
    index: int | None = None

    def read(self, source: WeightSource, rows: range) -> Tensor:
        """Some of its rows."""
        return source.read(self.name, self.shape, self.index, slice(self.first + rows.start, self.first + rows.stop))


@dataclass(frozen=True)
class ModelReader:
    """Reads a model for one rank. It reads only the experts that `placement` puts on this rank.

    Args:
        config, names, source: the model, its tensor names, and its weights.
        placement, rank: which expert goes into which slot of this rank.
        num_slots: slots of this rank in each sparse layer; others may have more or less.
        dispatchers: by the name that a plan uses.
        counter: counts the chosen experts.
        kit: makes the parts.
        limits: of experts and ranks, or None.
    """

    config: ModelConfig
    names: TensorNames
    source: WeightSource
    placement: Placement
    rank: int
    num_slots: int
    dispatchers: Mapping[str, Dispatcher]
    counter: ExpertCounter
    kit: Kit
    limits: Limits | None = None

    def read(self, progress: Callable[[], object]) -> Decoder:
        """Read the model. Calls `progress` after every layer."""
        config, kit, names = self.config, self.kit, self.names
        first_norms = [self.norm(f"{self._prefix(index)}.{names.attention_norm}") for index in range(config.num_layers)]
        next_norms = [*first_norms[1:], self.norm(names.final_norm)]
        layers, sparse_blocks = [], []
        for index, next_norm in enumerate(next_norms):
            attention = self.attention(index, self.norm(f"{self._prefix(index)}.{names.mlp_norm}"))
            mlp: MLPBlock
            if config.layers[index].is_sparse:
                mlp = sparse = self.sparse_block(index, next_norm)
                sparse_blocks.append(sparse)
            else:
                mlp = self.dense_block(index, next_norm)
            layers.append(DecoderLayer(attention, mlp))
            self.source.release_all()
            progress()
        tied = config.tie_word_embeddings
        shape = (config.vocab_size, config.hidden_size)
        head, rows = kit.head(*shape)
        self.fill(rows, {names.embedding if tied else names.head: config.vocab_size})
        embed = head.tied_embedding() if tied else kit.embedding(self.tensor(names.embedding, *shape))
        self.source.release_all()
        nbytes = head.nbytes + (0 if tied else embed.nbytes)
        nbytes += sum(layer.attention.nbytes + layer.mlp.nbytes for layer in layers)
        rope = RotaryEmbedding(config.rope, kit.device)
        return Decoder(embed, first_norms[0], layers, sparse_blocks, head, rope, kit.attention_step, nbytes)

    def copy_expert(self, experts: Experts, slot: int, layer: int, expert: int, piece_bytes: int) -> Iterator[int]:
        """Read an expert of a sparse layer into a slot, in pieces of about `piece_bytes`; yields each piece's size."""
        for part, matrix in self._expert(self.config.moe_layers[layer], expert):
            rows = max(1, piece_bytes // (PANEL * matrix.shape[-1] * self.kit.dtype.itemsize)) * PANEL
            for first in range(0, matrix.num_rows, rows):
                piece = matrix.read(self.source, range(first, min(first + rows, matrix.num_rows)))
                experts.put(slot, part, first, piece.to(self.kit.dtype))
                yield piece.nbytes

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.source.read(name, shape).to(device=self.kit.device, dtype=dtype or self.kit.dtype)

    def fill(self, linear: Linear, weights: Mapping[str, int], inputs: int | None = None) -> None:
        """Put weights into a linear map, stacked by rows; `weights` has the number of rows of each.

        Args:
            inputs: default the model's hidden size.
        """
        found = [self.source.read(name, (count, inputs or self.config.hidden_size)) for name, count in weights.items()]
        linear.put(0, torch.cat(found).to(self.kit.dtype) if len(found) > 1 else found[0].to(self.kit.dtype))

    def norm(self, name: str) -> Norm:
        return self.kit.norm(self.tensor(name, self.config.hidden_size), self.config.rms_norm_eps)

    def attention(self, index: int, next_norm: Norm) -> AttentionBlock:
        names, hidden, config = self.names, self.config.hidden_size, self.config.layers[index].attention
        prefix = self._prefix(index)
        rows = {names.query: config.query_size, names.key: config.kv_size, names.value: config.kv_size}
        bias = out_bias = None
        if config.qkv_bias:
            bias = torch.cat([self.tensor(f"{prefix}.{part}.bias", count) for part, count in rows.items()])
        qkv = self.kit.linear(sum(rows.values()), hidden, bias)
        self.fill(qkv, {f"{prefix}.{part}.weight": count for part, count in rows.items()})
        if config.output_bias:
            out_bias = self.tensor(f"{prefix}.{names.attention_output}.bias", hidden)
        output = self.kit.linear(hidden, config.query_size, out_bias)
        self.fill(output, {f"{prefix}.{names.attention_output}.weight": hidden}, config.query_size)
        q_norm, k_norm = (
            self.tensor(f"{prefix}.{name}", config.head_dim) if config.qk_norm else None
            for name in (names.query_norm, names.key_norm)
        )
        return self.kit.attention(config, self.config.rms_norm_eps, qkv, output, q_norm, k_norm, next_norm)

    def dense_block(self, index: int, next_norm: Norm) -> MLPBlock:
        size = self.config.layers[index].dense_intermediate_size
        assert size is not None
        return self.kit.dense_block(self.mlp(f"{self._prefix(index)}.{self.names.dense}", size), next_norm)

    def mlp(self, prefix: str, intermediate: int) -> MLP:
        mlp = self.kit.mlp(self.config.hidden_size, intermediate)
        for part, matrix in self._matrices(prefix, self.names.dense_parts, intermediate):
            mlp.put(0, part, 0, matrix.read(self.source, range(matrix.num_rows)).to(self.kit.dtype))
        return mlp

    def sparse_block(self, index: int, next_norm: Norm) -> SparseBlock:
        c, moe, names = self.config, self.config.moe, self.names
        prefix = self._sparse_prefix(index)
        row = c.moe_layers.index(index)
        gate_dtype = torch.float32 if moe.gate_float32 else self.kit.dtype
        weight_ED = self.tensor(f"{prefix}.{names.gate}", moe.num_experts, c.hidden_size, dtype=gate_dtype)
        bias_E = None
        if moe.correction_bias:
            bias_E = self.tensor(f"{prefix}.{names.correction_bias}", moe.num_experts, dtype=torch.float32)
        slot_E = torch.from_numpy(self.placement.first_slot[row]).to(device=self.kit.device, dtype=torch.int64)
        slots_WS = self.placement.slots[row]
        counts_2E, limits = self.counter.layer(row), None
        if self.limits is not None:
            limits = LayerLimits(self.limits, moe, bias_E, counts_2E, row, slots_WS.shape[1])
        gate_counts = self.limits is None or not self.limits.changes_experts
        gate = self.kit.gate(moe, weight_ED, bias_E, counts_2E if gate_counts else None, row)
        experts = self.kit.experts(self.num_slots, c.hidden_size, moe.intermediate_size)
        for slot, expert in enumerate(slots_WS[self.rank, : self.num_slots].tolist()):
            if expert >= 0:
                for _ in self.copy_expert(experts, slot, row, expert, WHOLE):
                    pass
        shared = None
        if moe.shared_intermediate_size:
            shared = self.mlp(f"{prefix}.{names.shared}", moe.shared_intermediate_size)
        return self.kit.sparse_block(gate, slot_E, experts, shared, next_norm, self.dispatchers, limits)

    def _expert(self, index: int, expert: int) -> Iterator[tuple[ExpertPart, StoredMatrix]]:
        """The matrices of one logical expert, stored by itself or fused with the others of its layer."""
        hidden, inner, total = self.config.hidden_size, self.config.moe.intermediate_size, self.config.moe.num_experts
        gate_up_name, down_name = (
            f"{self._prefix(index)}.{name}" for name in (self.names.fused_gate_up, self.names.fused_down)
        )
        if not self.source.has(gate_up_name):
            prefix = f"{self._sparse_prefix(index)}.{self.names.expert.format(expert)}"
            yield from self._matrices(prefix, self.names.expert_parts, inner)
            return
        shape = (total, 2 * inner, hidden)
        yield "gate", StoredMatrix(gate_up_name, shape, inner, 0, expert)
        yield "up", StoredMatrix(gate_up_name, shape, inner, inner, expert)
        yield "down", StoredMatrix(down_name, (total, hidden, inner), hidden, 0, expert)

    def _matrices(self, prefix: str, parts: SwiGLUNames, inner: int) -> Iterator[tuple[ExpertPart, StoredMatrix]]:
        """The three matrices of a SwiGLU that are stored under `prefix`."""
        hidden = self.config.hidden_size
        yield "gate", StoredMatrix(f"{prefix}.{parts.gate}.weight", (inner, hidden), inner)
        yield "up", StoredMatrix(f"{prefix}.{parts.up}.weight", (inner, hidden), inner)
        yield "down", StoredMatrix(f"{prefix}.{parts.down}.weight", (hidden, inner), hidden)

    def _prefix(self, index: int) -> str:
        return self.names.layer.format(index)

    def _sparse_prefix(self, index: int) -> str:
        """The sparse block's prefix: the family's own, or the one that newer checkpoints of all families use."""
        prefix = f"{self._prefix(index)}.{self.names.sparse}"
        return prefix if self.source.has(f"{prefix}.{self.names.gate}") else f"{self._prefix(index)}.{self.names.dense}"
