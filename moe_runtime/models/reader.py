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
from moe_runtime.layers.capacity import LayerLimits
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.kit import MLP, AttentionBlock, DecoderLayer, Experts, Kit, Linear, MLPBlock, Norm, SparseBlock
from moe_runtime.layers.moe import ExpertCounter
from moe_runtime.layers.rotary import RotaryEmbedding
from moe_runtime.models.expert_tensors import ExpertTensors
from moe_runtime.models.names import SwiGLUNames, TensorNames
from moe_runtime.types.weight_format import PANEL
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
        head, rows = kit.head(*shape)
        self.fill(rows, names.embedding if tied else names.head, *shape)
        embed = head.tied_embedding() if tied else kit.embedding(self.tensor(names.embedding, *shape))
        self.source.release_all()
        nbytes = head.nbytes + (0 if tied else embed.nbytes)
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
        kept: dict[str, Tensor] = {}
        for part, stored in self.experts.expert(self.config.moe_layers[layer], expert):
            rows = max(1, piece_bytes // (PANEL * stored.num_inputs * self.kit.dtype.itemsize)) * PANEL
            for first in range(0, stored.num_rows, rows):
                piece = stored.read(self.source, range(first, min(first + rows, stored.num_rows)), kept)
                experts.put(slot, part, first, piece.to(self.kit.dtype))
                yield piece.nbytes

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.source.read(name, shape).to(device=self.kit.device, dtype=dtype or self.kit.dtype)

    def fill(self, linear: Linear, name: str, *shape: int) -> None:
        """Put a weight into a linear map, without a copy of the whole on the kit's device."""
        linear.put(0, self.source.read(name, shape).to(self.kit.dtype))

    def norm(self, name: str) -> Norm:
        weight_D = self.tensor(name, self.config.hidden_size)
        return self.kit.norm(weight_D, self.config.rms_norm_eps, self.config.residual_multiplier)

    def attention(self, index: int, next_norm: Norm) -> AttentionBlock:
        config = self.config.layers[index].attention
        if isinstance(config, LatentAttentionConfig):
            return self._latent_attention(self.names.layer.format(index), config, next_norm)
        return self._grouped_attention(self.names.layer.format(index), config, next_norm)

    def _grouped_attention(self, prefix: str, config: AttentionConfig, next_norm: Norm) -> AttentionBlock:
        names, hidden = self.names, self.config.hidden_size
        rows = {names.query: config.query_size, names.key: config.kv_size, names.value: config.kv_size}
        turned = (names.query, names.key)

        def stacked(suffix: str, *inputs: int) -> Tensor:
            found = {part: self.tensor(f"{prefix}.{part}.{suffix}", count, *inputs) for part, count in rows.items()}
            return torch.cat([self._halves(x, config.head_dim) if part in turned else x for part, x in found.items()])

        qkv = self.kit.linear(sum(rows.values()), hidden, stacked("bias") if config.qkv_bias else None)
        qkv.put(0, stacked("weight", hidden))
        output = self._attention_output(prefix, config.query_size, config.output_bias)
        q_norm, k_norm = (
            self._halves(self.tensor(f"{prefix}.{name}", size), config.head_dim) if size else None
            for name, size in zip((names.query_norm, names.key_norm), config.norm_sizes, strict=True)
        )
        sinks_H = None
        if config.sinks:
            sinks_H = self.tensor(f"{prefix}.{names.sinks}", config.num_heads, dtype=torch.float32)
        return self.kit.attention(config, self.config.rms_norm_eps, qkv, output, q_norm, k_norm, sinks_H, next_norm)

    def _latent_attention(self, prefix: str, config: LatentAttentionConfig, next_norm: Norm) -> AttentionBlock:
        names, hidden, kit, rank = self.names.latent, self.config.hidden_size, self.kit, config.query_rank
        query = self.names.query if rank is None else names.query_down
        head_size = config.nope_size + config.rope_size

        def down_rows(suffix: str, *inputs: int) -> Tensor:
            if rank is not None:
                queries = self.tensor(f"{prefix}.{query}.{suffix}", rank, *inputs)
            elif inputs:
                queries = self.tensor(f"{prefix}.{query}.{suffix}", config.query_size, *inputs)
                queries = self._halves(queries, head_size, config.nope_size)
            else:  # a projection to queries that are not compressed has no bias
                queries = torch.zeros(config.query_size, dtype=kit.dtype, device=kit.device)
            latent = self.tensor(f"{prefix}.{names.latent_down}.{suffix}", config.key_size, *inputs)
            return torch.cat((queries, self._halves(latent, config.key_size, config.latent_size)))

        down = kit.linear(config.down_size, hidden, down_rows("bias") if config.bias else None)
        down.put(0, down_rows("weight", hidden))
        up = query_norm = None
        if rank is not None:
            query_norm = self.tensor(f"{prefix}.{names.query_norm}", rank)
            up = kit.linear(config.query_size, rank)
            weight = self.tensor(f"{prefix}.{names.query_up}.weight", config.query_size, rank)
            up.put(0, self._halves(weight, head_size, config.nope_size))
        key = kit.head_matrices(config.num_heads, config.latent_size, config.nope_size)
        value = kit.head_matrices(config.num_heads, config.head_value_size, config.latent_size)
        size = config.nope_size + config.head_value_size
        both = self.tensor(f"{prefix}.{names.latent_up}.weight", config.num_heads * size, config.latent_size)
        for head, weight in enumerate(both.unflatten(0, (config.num_heads, size))):
            key.put(head, 0, weight[: config.nope_size].T.contiguous())
            value.put(head, 0, weight[config.nope_size :])
        output = self._attention_output(prefix, config.output_size, config.bias)
        latent_norm = self.tensor(f"{prefix}.{names.latent_norm}", config.latent_size)
        return kit.latent_attention(config, down, up, key, value, output, query_norm, latent_norm, next_norm)

    def _attention_output(self, prefix: str, inputs: int, has_bias: bool) -> Linear:
        name, hidden = f"{prefix}.{self.names.attention_output}", self.config.hidden_size
        output = self.kit.linear(hidden, inputs, self.tensor(f"{name}.bias", hidden) if has_bias else None)
        self.fill(output, f"{name}.weight", hidden, inputs)
        return output

    def dense_block(self, index: int, next_norm: Norm) -> MLPBlock:
        size = self.config.layers[index].dense_intermediate_size
        assert size is not None
        mlp = self.mlp(f"{self.names.layer.format(index)}.{self.names.dense}", self.names.dense_parts, size)
        return self.kit.dense_block(mlp, next_norm)

    def mlp(self, prefix: str, names: SwiGLUNames, intermediate: int, gate_D: Tensor | None = None) -> MLP:
        mlp = self.kit.mlp(self.config.hidden_size, intermediate, gate_D)
        for part, stored in self.experts.swiglu(prefix, names, intermediate):
            mlp.put(0, part, 0, stored.read(self.source, range(stored.num_rows), {}).to(self.kit.dtype))
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
        experts = self.kit.experts(self.num_slots, c.hidden_size, moe)
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
        return self.mlp(f"{prefix}.{names.shared}", names.shared_parts, moe.shared_intermediate_size, gate_D)

    def _halves(self, x: Tensor, head_size: int, first: int = 0) -> Tensor:
        """Rows of heads, whose rotary pairs are brought from neighbours to halves if the checkpoint interleaves them.

        `first` is the first rotated row of a head.
        """
        rope = self.config.rope
        if not rope.interleaved:
            return x
        order = torch.arange(head_size)
        rotated = slice(first, first + rope.rotary_dim)
        order[rotated] = order[rotated].view(-1, 2).T.flatten()
        return x.view(-1, head_size, *x.shape[1:])[:, order].flatten(0, 1)
