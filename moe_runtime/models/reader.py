"""How a decoder is read from a checkpoint, tensor by tensor, into the parts of a kit.

Shape suffixes: D hidden, F intermediate, V vocabulary, E logical experts, W ranks, S slots per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher, RowOps
from moe_runtime.balancer.placement import Placement
from moe_runtime.config.model import ModelConfig, MoEConfig
from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels.cpu.packed import PANEL
from moe_runtime.layers.batch import Batch
from moe_runtime.layers.capacity import LayerLimits, Limits
from moe_runtime.layers.decoder import Decoder, DecoderLayer, LayerRunner
from moe_runtime.layers.kv_cache import KVCache
from moe_runtime.layers.moe import ExpertCounter
from moe_runtime.layers.rotary import RotaryEmbedding
from moe_runtime.layers.torch_kit import Embedding
from moe_runtime.models.names import DENSE_NAMES, ExpertNames
from moe_runtime.models.registry import family_module
from moe_runtime.weights.checkpoint import WeightSource

WHOLE = 1 << 62  # bytes of a piece that is everything


class Rows(Protocol):
    """A linear map whose weight is loaded by rows; pieces of it end where `PANEL` divides their rows."""

    def load(self, first_row: int, weight_ND: Tensor, /) -> None: ...


class Slots(Protocol):
    """Experts, or an MLP as one expert, whose weights are loaded by slot, in pieces as those of `Rows`."""

    def load(self, slot: int, part: ExpertPart, first_row: int, rows: Tensor, /) -> None: ...


class Kit(Protocol):
    """Makes a decoder's parts in one implementation. Parts of one kit fit together; here they are opaque."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def row_ops(self) -> RowOps: ...
    def describe(self) -> dict[str, str]: ...
    def linear(self, outputs: int, inputs: int, bias: Tensor | None = None) -> Any: ...
    def head(self, vocab_size: int, hidden_size: int) -> tuple[Any, Rows]: ...
    def norm(self, weight_D: Tensor, eps: float) -> Any: ...
    def attention(
        self, config: ModelConfig, qkv: Any, output: Any, q_norm: Tensor | None, k_norm: Tensor | None, next_norm: Any
    ) -> Any: ...
    def attention_step(self, batch: Batch, rope: RotaryEmbedding) -> Any: ...
    def argmax(self, logits_BV: Tensor) -> list[int]: ...
    def bind(self, layers: list[DecoderLayer], cache: KVCache) -> LayerRunner: ...
    def mlp(self, hidden_size: int, intermediate_size: int) -> Any: ...
    def dense_block(self, mlp: Any, next_norm: Any) -> Any: ...
    def experts(self, num_slots: int, hidden_size: int, intermediate_size: int) -> Any: ...
    def gate(
        self,
        config: MoEConfig,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        counts_2E: Tensor | None,
        layer: int,
    ) -> Any: ...
    def sparse_block(
        self,
        gate: Any,
        slot_E: Tensor,
        experts: Any,
        shared: Any,
        next_norm: Any,
        dispatchers: Mapping[str, Dispatcher],
        limits: LayerLimits | None,
    ) -> Any: ...


@dataclass(frozen=True)
class ModelReader:
    """Reads a model for one rank; of the experts only those that `placement` puts there.

    Args:
        config, source: the model and its weights.
        placement, rank: which expert goes into which slot here.
        num_slots: slots of this rank in each sparse layer; others may have more or less.
        dispatchers: by the name that a plan uses.
        counter: where choices of experts are counted.
        kit: makes the parts.
        limits: of experts and ranks, or None.
    """

    config: ModelConfig
    source: WeightSource
    placement: Placement
    rank: int
    num_slots: int
    dispatchers: Mapping[str, Dispatcher]
    counter: ExpertCounter
    kit: Kit
    limits: Limits | None = None

    def load(self, progress: Callable[[], object]) -> Decoder:
        """Read the model. Calls `progress` after every layer."""
        config, kit = self.config, self.kit
        norms = [self.norm(f"model.layers.{index}.input_layernorm.weight") for index in range(config.num_layers)]
        next_norms = [*norms[1:], self.norm("model.norm.weight")]
        layers = []
        for index, next_norm in enumerate(next_norms):
            layers.append(self.layer(index, next_norm))
            self.source.release_all()  # also pages that tensors share, or that were read beside them
            progress()
        tied = config.tie_word_embeddings
        shape = (config.vocab_size, config.hidden_size)
        head, rows = kit.head(*shape)
        self.fill(rows, {"model.embed_tokens.weight" if tied else "lm_head.weight": config.vocab_size})
        embed = head.tied_embedding() if tied else Embedding(self.tensor("model.embed_tokens.weight", *shape))
        self.source.release_all()
        nbytes = head.nbytes + (0 if tied else embed.nbytes)
        nbytes += sum(layer.attention.nbytes + layer.mlp.nbytes for layer in layers)
        rope = RotaryEmbedding(config.rope, kit.device)
        sparse = [layers[index].mlp for index in config.moe_layers]
        return Decoder(embed, norms[0], layers, sparse, head, rope, kit.attention_step, nbytes)

    def copy_expert(self, slots: Slots, slot: int, layer: int, expert: int, piece_bytes: int) -> Iterator[int]:
        """Read an expert of a sparse layer into a slot, in pieces of about so many bytes; gives the size of each."""
        for part, stored in self._expert(self.config.moe_layers[layer], expert):
            rows = max(1, piece_bytes // (PANEL * stored.shape[1] * stored.element_size())) * PANEL
            for first in range(0, len(stored), rows):
                piece = stored[first : first + rows]
                slots.load(slot, part, first, piece.to(self.kit.dtype))
                yield piece.nbytes
            self.source.release(stored)

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.source.read(name, shape).to(device=self.kit.device, dtype=dtype or self.kit.dtype)

    def fill(self, rows: Rows, weights: Mapping[str, int], inputs: int | None = None) -> None:
        """Load weights, one below the other, into a linear map; `weights` has the rows of each.

        Args:
            inputs: default the model's hidden size.
        """
        found = [self.source.read(name, (count, inputs or self.config.hidden_size)) for name, count in weights.items()]
        rows.load(0, torch.cat(found).to(self.kit.dtype) if len(found) > 1 else found[0].to(self.kit.dtype))
        for stored in found:
            self.source.release(stored)

    def norm(self, name: str) -> Any:
        return self.kit.norm(self.tensor(name, self.config.hidden_size), self.config.rms_norm_eps)

    def layer(self, index: int, next_norm: Any) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        attention = self.attention(f"{prefix}.self_attn", self.norm(f"{prefix}.post_attention_layernorm.weight"))
        if index in self.config.moe_layers:
            return DecoderLayer(attention, self.sparse_block(index, next_norm))
        mlp = self.mlp(f"{prefix}.mlp", self.config.intermediate_size)
        return DecoderLayer(attention, self.kit.dense_block(mlp, next_norm))

    def attention(self, prefix: str, next_norm: Any) -> Any:
        c = self.config
        sizes = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        rows = {name: heads * c.head_dim for name, heads in sizes.items()}
        bias = torch.cat([self.tensor(f"{prefix}.{p}.bias", n) for p, n in rows.items()]) if c.qkv_bias else None
        qkv = self.kit.linear(sum(rows.values()), c.hidden_size, bias)
        self.fill(qkv, {f"{prefix}.{part}.weight": count for part, count in rows.items()})
        out_bias = self.tensor(f"{prefix}.o_proj.bias", c.hidden_size) if c.output_bias else None
        output = self.kit.linear(c.hidden_size, rows["q_proj"], out_bias)
        self.fill(output, {f"{prefix}.o_proj.weight": c.hidden_size}, rows["q_proj"])
        norms = [self.tensor(f"{prefix}.{p}.weight", c.head_dim) if c.qk_norm else None for p in ("q_norm", "k_norm")]
        return self.kit.attention(c, qkv, output, norms[0], norms[1], next_norm)

    def mlp(self, prefix: str, intermediate: int) -> Any:
        mlp = self.kit.mlp(self.config.hidden_size, intermediate)
        for part, stored in self._matrices(prefix, DENSE_NAMES, intermediate):
            mlp.load(0, part, 0, stored.to(self.kit.dtype))
            self.source.release(stored)
        return mlp

    def sparse_block(self, index: int, next_norm: Any) -> Any:
        c, moe = self.config, self.config.moe
        prefix = self._block_prefix(index)
        row = c.moe_layers.index(index)
        gate_dtype = torch.float32 if moe.gate_float32 else self.kit.dtype
        weight_ED = self.tensor(f"{prefix}.gate.weight", moe.num_experts, c.hidden_size, dtype=gate_dtype)
        bias_E = None
        if moe.correction_bias:
            name = f"{prefix}.gate.e_score_correction_bias"
            bias_E = self.tensor(name, moe.num_experts, dtype=torch.float32)
        slot_E = torch.from_numpy(self.placement.first_slot[row]).to(device=self.kit.device, dtype=torch.int64)
        slots_WS = self.placement.slots[row]
        counts_2E, limits = self.counter.layer(row), None
        if self.limits is not None:
            limits = LayerLimits(self.limits, moe, bias_E, counts_2E, row, slots_WS.shape[1])
        gate_counts = limits is None or not limits.changes_experts
        gate = self.kit.gate(moe, weight_ED, bias_E, counts_2E if gate_counts else None, row)
        experts = self.kit.experts(self.num_slots, c.hidden_size, moe.intermediate_size)
        for slot, expert in enumerate(slots_WS[self.rank, : self.num_slots].tolist()):
            if expert >= 0:
                for _ in self.copy_expert(experts, slot, row, expert, WHOLE):
                    pass
        shared = None
        if moe.shared_intermediate_size:
            shared = self.mlp(f"{prefix}.shared_experts", moe.shared_intermediate_size)
        return self.kit.sparse_block(gate, slot_E, experts, shared, next_norm, self.dispatchers, limits)

    def _expert(self, index: int, expert: int) -> Iterator[tuple[ExpertPart, Tensor]]:
        """The matrices of one logical expert, stored by itself or fused with the others of its layer."""
        hidden, inner, total = self.config.hidden_size, self.config.moe.intermediate_size, self.config.moe.num_experts
        fused = f"model.layers.{index}.mlp.experts"
        if not self.source.has(f"{fused}.gate_up_proj"):
            yield from self._matrices(f"{self._block_prefix(index)}.experts.{expert}", self.names, inner)
            return
        gate_up = self.source.read(f"{fused}.gate_up_proj", (total, 2 * inner, hidden), expert)
        yield "gate", gate_up[:inner]
        yield "up", gate_up[inner:]
        yield "down", self.source.read(f"{fused}.down_proj", (total, hidden, inner), expert)

    def _matrices(self, prefix: str, names: ExpertNames, intermediate: int) -> Iterator[tuple[ExpertPart, Tensor]]:
        """The three matrices of a SwiGLU that are stored under `prefix`."""
        hidden = self.config.hidden_size
        yield "gate", self.source.read(f"{prefix}.{names.gate}.weight", (intermediate, hidden))
        yield "up", self.source.read(f"{prefix}.{names.up}.weight", (intermediate, hidden))
        yield "down", self.source.read(f"{prefix}.{names.down}.weight", (hidden, intermediate))

    @property
    def names(self) -> ExpertNames:
        names: ExpertNames = family_module(self.config.family).EXPERT_NAMES
        return names

    def _block_prefix(self, index: int) -> str:
        """The sparse block's prefix: the family's own, or the one that newer checkpoints of all families use."""
        prefix = f"model.layers.{index}.{self.names.block}"
        return prefix if self.source.has(f"{prefix}.gate.weight") else f"model.layers.{index}.mlp"
