"""Reads a decoder from a checkpoint, tensor by tensor, into the parts of a kit.

Shape suffixes: D hidden, F intermediate, V vocabulary, E logical experts, W ranks, S slots per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher
from moe_runtime.balancer.placement import Placement
from moe_runtime.config.attention import AttentionConfig, LatentAttentionConfig
from moe_runtime.config.limits import Limits
from moe_runtime.config.model import ModelConfig
from moe_runtime.kernels.quantized import QuantizedMatrix, quantize, stack_rows, take_rows
from moe_runtime.layers.capacity import LayerLimits
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.kit import MLP, AttentionBlock, DecoderLayer, Experts, Kit, Linear, MLPBlock, Norm, SparseBlock
from moe_runtime.layers.moe import ExpertCounter
from moe_runtime.layers.rotary import RotaryEmbedding
from moe_runtime.models.expert_tensors import ExpertTensors, Kept, StoredPart
from moe_runtime.models.names import SwiGLUNames, TensorNames
from moe_runtime.types.weight_format import PANEL, BlockFormats, WeightFormat
from moe_runtime.weights.checkpoint import WeightSource

WHOLE = 1 << 62  # piece size in bytes that means "in one piece"


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

    @cached_property
    def experts(self) -> ExpertTensors:
        """Where the experts' tensors are."""
        return ExpertTensors(self.config, self.names, self.source)

    def read(self, progress: Callable[[], object]) -> Decoder:
        """Read the model. Calls `progress` after every layer."""
        config, kit, names = self.config, self.kit, self.names
        first_norms = [
            self.norm(f"{names.layer.format(index)}.{names.attention_norm}") for index in range(config.num_layers)
        ]
        next_norms = [*first_norms[1:], self.norm(names.final_norm)]
        layers, sparse_blocks = [], []
        for index, next_norm in enumerate(next_norms):
            attention = self.attention(index, self.norm(f"{names.layer.format(index)}.{names.mlp_norm}"))
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
        head, rows = kit.head(*shape, config.head_format)
        rows.put(0, self.matrix(names.embedding if tied else names.head, *shape, format=config.head_format))
        shares = config.shares_embedding
        embed = head.tied_embedding() if shares else kit.embedding(self.tensor(names.embedding, *shape))
        self.source.release_all()
        nbytes = head.nbytes + (0 if shares else embed.nbytes)
        nbytes += sum(layer.attention.nbytes + layer.mlp.nbytes for layer in layers)
        rope = RotaryEmbedding(config.rope, kit.device)
        return Decoder(
            embed=embed,
            first_norm=first_norms[0],
            layers=layers,
            sparse_blocks=sparse_blocks,
            head=head,
            rope=rope,
            attention_steps=kit.attention_steps,
            nbytes=nbytes,
            embedding_multiplier=config.embedding_multiplier,
            logits_scaling=config.logits_scaling,
        )

    def copy_expert(self, experts: Experts, slot: int, layer: int, expert: int, piece_bytes: int) -> Iterator[int]:
        """Read an expert of a sparse layer into a slot, in pieces of about `piece_bytes`; yields each piece's size."""
        kept: Kept = {}
        index = self.config.moe_layers[layer]
        formats = self.config.layers[index].formats.experts
        for part, stored in self.experts.expert(index, expert):
            rows = max(1, piece_bytes // (PANEL * stored.num_inputs * self.kit.dtype.itemsize)) * PANEL
            for first in range(0, stored.num_rows, rows):
                piece = self.piece(stored, range(first, min(first + rows, stored.num_rows)), kept, formats.of(part))
                experts.put(slot, part, first, piece)
                yield piece.nbytes

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.source.read(name, shape).to(device=self.kit.device, dtype=dtype or self.kit.dtype)

    def matrix(self, name: str, outputs: int, inputs: int, format: WeightFormat | None) -> Tensor | QuantizedMatrix:
        """A matrix in a quantised format, or in the kit's dtype; not on the kit's device yet."""
        return self.piece(StoredPart(name, (outputs, inputs), outputs), range(outputs), {}, format)

    def piece(
        self, stored: StoredPart, rows: range, kept: Kept, format: WeightFormat | None
    ) -> Tensor | QuantizedMatrix:
        """As `matrix`, for rows of a part of a SwiGLU. Biases are in the kit's dtype."""
        if format is None or stored.is_bias:
            return stored.read(self.source, rows, kept).to(self.kit.dtype)
        if self._is_stored_as(stored.name, format):
            return stored.read_quantized(self.source, rows, kept)
        return quantize(stored.read(self.source, rows, kept), format)

    def norm(self, name: str) -> Norm:
        weight_D = self.tensor(name, self.config.hidden_size)
        return self.kit.norm(weight_D, self.config.rms_norm_eps, self.config.residual_multiplier)

    def _is_stored_as(self, name: str, format: WeightFormat) -> bool:
        """Whether a matrix is stored in the format in which it is to be held; if not, it is not quantised yet."""
        stored = self.source.format_of(name)
        assert stored in (None, format), f"{name}: stored as {stored}, held as {format}"
        return stored is not None

    def attention(self, index: int, next_norm: Norm) -> AttentionBlock:
        prefix, layer = self.names.layer.format(index), self.config.layers[index]
        if isinstance(layer.attention, LatentAttentionConfig):
            return self._latent_attention(prefix, layer.attention, layer.formats.attention, next_norm)
        assert isinstance(layer.attention, AttentionConfig)
        return self._grouped_attention(prefix, layer.attention, layer.formats.attention, next_norm)

    def _grouped_attention(
        self, prefix: str, config: AttentionConfig, formats: BlockFormats, next_norm: Norm
    ) -> AttentionBlock:
        names, hidden = self.names, self.config.hidden_size
        rows = {names.query: config.query_size, names.key: config.kv_size, names.value: config.kv_size}
        turned = (names.query, names.key)

        def stacked(found: Mapping[str, Tensor | QuantizedMatrix]) -> Tensor | QuantizedMatrix:
            return stack_rows(
                [
                    take_rows(x, self._halves(len(x), config.head_dim)) if part in turned else x
                    for part, x in found.items()
                ]
            )

        bias: Tensor | None = None
        if config.qkv_bias:
            biases = stacked({part: self.tensor(f"{prefix}.{part}.bias", count) for part, count in rows.items()})
            assert isinstance(biases, Tensor)
            bias = biases
        qkv = self.kit.linear(sum(rows.values()), hidden, bias, formats.input)
        weights = {
            part: self.matrix(f"{prefix}.{part}.weight", count, hidden, format=formats.input)
            for part, count in rows.items()
        }
        qkv.put(0, stacked(weights))
        output = self._attention_output(prefix, config.query_size, config.output_bias, formats.output)
        q_norm, k_norm = (
            self.tensor(f"{prefix}.{name}", size)[self._halves(size, config.head_dim)] if size else None
            for name, size in zip((names.query_norm, names.key_norm), config.norm_sizes, strict=True)
        )
        sinks_H = None
        if config.sinks:
            sinks_H = self.tensor(f"{prefix}.{names.sinks}", config.num_heads, dtype=torch.float32)
        return self.kit.attention(config, self.config.rms_norm_eps, qkv, output, q_norm, k_norm, sinks_H, next_norm)

    def _latent_attention(
        self, prefix: str, config: LatentAttentionConfig, formats: BlockFormats, next_norm: Norm
    ) -> AttentionBlock:
        names, hidden, kit, rank = self.names.latent, self.config.hidden_size, self.kit, config.query_rank
        query = self.names.query if rank is None else names.query_down
        format, head_size = formats.input, config.nope_size + config.rope_size

        query_order = self._halves(config.query_size, head_size, config.nope_size)
        latent_order = self._halves(config.key_size, config.key_size, config.latent_size)
        bias = None
        if config.bias:
            if rank is None:  # a projection to queries that are not compressed has no bias
                queries = torch.zeros(config.query_size, dtype=kit.dtype, device=kit.device)
            else:
                queries = self.tensor(f"{prefix}.{query}.bias", rank)
            latent = self.tensor(f"{prefix}.{names.latent_down}.bias", config.key_size)
            bias = torch.cat((queries, latent[latent_order]))
        down = kit.linear(config.down_size, hidden, bias, format)
        weight = self.matrix(f"{prefix}.{query}.weight", rank or config.query_size, hidden, format=format)
        if rank is None:
            weight = take_rows(weight, query_order)
        latent_weight = self.matrix(f"{prefix}.{names.latent_down}.weight", config.key_size, hidden, format=format)
        down.put(0, stack_rows([weight, take_rows(latent_weight, latent_order)]))
        up = query_norm = None
        if rank is not None:
            query_norm = self.tensor(f"{prefix}.{names.query_norm}", rank)
            up = kit.linear(config.query_size, rank, format=format)
            weight = self.matrix(f"{prefix}.{names.query_up}.weight", config.query_size, rank, format=format)
            up.put(0, take_rows(weight, query_order))
        key = kit.head_matrices(config.num_heads, config.latent_size, config.nope_size)
        value = kit.head_matrices(config.num_heads, config.head_value_size, config.latent_size)
        size = config.nope_size + config.head_value_size
        both = self.tensor(f"{prefix}.{names.latent_up}.weight", config.num_heads * size, config.latent_size)
        for head, rows in enumerate(both.unflatten(0, (config.num_heads, size))):
            key.put(head, 0, rows[: config.nope_size].T.contiguous())
            value.put(head, 0, rows[config.nope_size :])
        output = self._attention_output(prefix, config.output_size, config.bias, formats.output)
        latent_norm = self.tensor(f"{prefix}.{names.latent_norm}", config.latent_size)
        return kit.latent_attention(config, down, up, key, value, output, query_norm, latent_norm, next_norm)

    def _attention_output(self, prefix: str, inputs: int, has_bias: bool, format: WeightFormat | None) -> Linear:
        name, hidden = f"{prefix}.{self.names.attention_output}", self.config.hidden_size
        output = self.kit.linear(hidden, inputs, self.tensor(f"{name}.bias", hidden) if has_bias else None, format)
        output.put(0, self.matrix(f"{name}.weight", hidden, inputs, format=format))
        return output

    def dense_block(self, index: int, next_norm: Norm) -> MLPBlock:
        size = self.config.layers[index].dense_intermediate_size
        assert size is not None
        prefix = f"{self.names.layer.format(index)}.{self.names.dense}"
        mlp = self.mlp(prefix, self.names.dense_parts, size, self.config.layers[index].formats.mlp)
        return self.kit.dense_block(mlp, next_norm)

    def mlp(
        self,
        prefix: str,
        names: SwiGLUNames,
        intermediate: int,
        formats: BlockFormats,
        gate_D: Tensor | None = None,
    ) -> MLP:
        mlp = self.kit.mlp(self.config.hidden_size, intermediate, gate_D, formats)
        for part, stored in self.experts.swiglu(prefix, names, intermediate):
            mlp.put(0, part, 0, self.piece(stored, range(stored.num_rows), {}, formats.of(part)))
        return mlp

    def sparse_block(self, index: int, next_norm: Norm) -> SparseBlock:
        c, moe, names = self.config, self.config.moe, self.names
        prefix = self.experts.sparse(index)
        row = c.moe_layers.index(index)
        gate_dtype = torch.float32 if moe.gate_float32 else self.kit.dtype
        weight_ED = self.tensor(f"{prefix}.{names.gate}", moe.num_experts, c.hidden_size, dtype=gate_dtype)
        bias_E = None
        if moe.correction_bias:
            shape = (1, moe.num_experts) if names.correction_bias_is_row else (moe.num_experts,)
            bias_E = self.tensor(f"{prefix}.{names.correction_bias}", *shape, dtype=torch.float32).flatten()
        slot_E = torch.from_numpy(self.placement.first_slot[row]).to(device=self.kit.device, dtype=torch.int64)
        slots_WS = self.placement.slots[row]
        counts_2E, limits = self.counter.layer(row), None
        if self.limits is not None:
            limits = LayerLimits(self.limits, moe, bias_E, counts_2E, row, slots_WS.shape[1])
        gate_counts = self.limits is None or not self.limits.changes_experts
        logit_bias_E = None
        if moe.gate_bias:
            logit_bias_E = self.tensor(f"{prefix}.{names.gate_bias}", moe.num_experts, dtype=gate_dtype)
        gate = self.kit.gate(moe, weight_ED, logit_bias_E, bias_E, counts_2E if gate_counts else None, row)
        experts = self.kit.experts(self.num_slots, c.hidden_size, moe, c.layers[index].formats.experts)
        for slot, expert in enumerate(slots_WS[self.rank, : self.num_slots].tolist()):
            if expert >= 0:
                for _ in self.copy_expert(experts, slot, row, expert, WHOLE):
                    pass
        shared = self._shared_experts(index) if moe.shared_intermediate_size else None
        return self.kit.sparse_block(gate, slot_E, experts, shared, next_norm, self.dispatchers, limits)

    def _shared_experts(self, index: int) -> MLP:
        moe, names, prefix = self.config.moe, self.names, self.names.layer.format(index)
        gate_D = None
        if moe.shared_gate:
            gate_D = self.tensor(f"{prefix}.{names.shared_gate}", 1, self.config.hidden_size)[0]
        formats = self.config.layers[index].formats.mlp
        return self.mlp(f"{prefix}.{names.shared}", names.shared_parts, moe.shared_intermediate_size, formats, gate_D)

    def _halves(self, rows: int, head_size: int, first: int = 0) -> Tensor | slice:
        """The order in which rows of heads are held: rotary pairs are brought from neighbours to halves if the
        checkpoint interleaves them. `first` is the first rotated row of a head."""
        rope = self.config.rope
        if not rope.interleaved:
            return slice(None)
        order = torch.arange(head_size)
        rotated = slice(first, first + rope.rotary_dim)
        order[rotated] = order[rotated].view(-1, 2).T.flatten()
        return torch.arange(rows).view(-1, head_size)[:, order].flatten()
