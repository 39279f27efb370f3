"""The decoder that all families share, and how it is read from a checkpoint.

Shape suffixes: T tokens, D hidden, V vocabulary, E logical experts, G = 2F (gate rows, then up rows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher
from moe_runtime.balancer.placement import Placement
from moe_runtime.config import ModelConfig
from moe_runtime.experts.slots import ExpertSlots
from moe_runtime.gate import Gate
from moe_runtime.kernels import ops
from moe_runtime.kv_cache import KVCache
from moe_runtime.layers import MLP, Attention, Linear, RotaryEmbedding
from moe_runtime.models import family_module
from moe_runtime.models.names import ExpertNames
from moe_runtime.moe import ExpertCounter, MoELayer
from moe_runtime.weights import WeightSource


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step, as tensors on its device.

    Attributes:
        token_T, position_T: token ids and their positions, int64.
        num_prompt_T: length of the prompt of each token's sequence.
        slot_T: where each token's key and value go: page * block size + offset.
        attention: pages and lengths per sequence.
        num_decode: so many leading tokens are decode rows.
        dispatcher, tokens_per_rank: as the plan says.
    """

    token_T: Tensor
    position_T: Tensor
    num_prompt_T: Tensor
    slot_T: Tensor
    attention: ops.AttentionMetadata
    num_decode: int
    dispatcher: str
    tokens_per_rank: list[int]


@dataclass(frozen=True)
class DecoderLayer:
    """Attention, then a sparse or a dense MLP, each behind a norm and a residual sum."""

    input_norm_D: Tensor
    attention: Attention
    post_norm_D: Tensor
    mlp: MLP | MoELayer

    @property
    def nbytes(self) -> int:
        return self.attention.nbytes + self.mlp.nbytes


@dataclass(frozen=True)
class Decoder:
    """A causal language model over the paged cache."""

    embed_VD: Tensor
    layers: list[DecoderLayer]
    norm_D: Tensor
    head_VD: Tensor
    rope: RotaryEmbedding
    eps: float

    @property
    def nbytes(self) -> int:
        head = 0 if self.head_VD is self.embed_VD else self.head_VD.nbytes
        return self.embed_VD.nbytes + head + sum(layer.nbytes for layer in self.layers)

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states `[T, D]` after the last norm. All ranks call it for the same step, also without tokens."""
        residual_TD = F.embedding(batch.token_T, self.embed_VD)
        rope = tuple(part.to(residual_TD.dtype) for part in self.rope(batch.position_T, batch.num_prompt_T))
        x_TD = ops.rms_norm(residual_TD, self.layers[0].input_norm_D, self.eps)
        next_norms = [layer.input_norm_D for layer in self.layers[1:]] + [self.norm_D]
        for index, (layer, next_norm_D) in enumerate(zip(self.layers, next_norms, strict=True)):
            x_TD = layer.attention(x_TD, (rope[0], rope[1]), cache.layer(index), batch.slot_T, batch.attention)
            x_TD, residual_TD = ops.add_rms_norm(x_TD, residual_TD, layer.post_norm_D, self.eps)
            if isinstance(layer.mlp, MoELayer):
                x_TD = layer.mlp(x_TD, batch.dispatcher, batch.tokens_per_rank, batch.num_decode)
            else:
                x_TD = layer.mlp(x_TD)
            x_TD, residual_TD = ops.add_rms_norm(x_TD, residual_TD, next_norm_D, self.eps)
        return x_TD

    def logits(self, x_TD: Tensor) -> Tensor:
        """`[T, V]` in float32."""
        return F.linear(x_TD, self.head_VD).float()


def build_decoder(
    config: ModelConfig,
    source: WeightSource,
    placement: Placement,
    rank: int,
    dispatchers: Mapping[str, Dispatcher],
    counter: ExpertCounter,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[], object],
) -> Decoder:
    """Read a model; of the experts only those that `placement` puts on `rank`. Calls `progress` after every layer."""
    builder = _Builder(config, source, placement, rank, dispatchers, counter, dtype, device)
    embed_VD = builder.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = []
    for index in range(config.num_layers):
        layers.append(builder.layer(index))
        progress()
    head_VD = embed_VD
    if not config.tie_word_embeddings:
        head_VD = builder.tensor("lm_head.weight", config.vocab_size, config.hidden_size)
    norm_D = builder.tensor("model.norm.weight", config.hidden_size)
    rope = RotaryEmbedding(config.rope, device)
    return Decoder(embed_VD, layers, norm_D, head_VD, rope, config.rms_norm_eps)


@dataclass(frozen=True)
class _Builder:
    config: ModelConfig
    source: WeightSource
    placement: Placement
    rank: int
    dispatchers: Mapping[str, Dispatcher]
    counter: ExpertCounter
    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.source.read(name, shape).to(device=self.device, dtype=dtype or self.dtype)

    def layer(self, index: int) -> DecoderLayer:
        prefix, hidden = f"model.layers.{index}", self.config.hidden_size
        sparse = index in self.config.moe_layers
        return DecoderLayer(
            input_norm_D=self.tensor(f"{prefix}.input_layernorm.weight", hidden),
            attention=self.attention(f"{prefix}.self_attn"),
            post_norm_D=self.tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
            mlp=self.moe(index) if sparse else self.mlp(f"{prefix}.mlp", self.config.intermediate_size),
        )

    def attention(self, prefix: str) -> Attention:
        c = self.config
        sizes = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        rows = {name: heads * c.head_dim for name, heads in sizes.items()}
        weight = torch.cat([self.tensor(f"{prefix}.{p}.weight", n, c.hidden_size) for p, n in rows.items()])
        bias = torch.cat([self.tensor(f"{prefix}.{p}.bias", n) for p, n in rows.items()]) if c.qkv_bias else None
        out_weight = self.tensor(f"{prefix}.o_proj.weight", c.hidden_size, rows["q_proj"])
        out_bias = self.tensor(f"{prefix}.o_proj.bias", c.hidden_size) if c.output_bias else None
        norms = [self.tensor(f"{prefix}.{p}.weight", c.head_dim) if c.qk_norm else None for p in ("q_norm", "k_norm")]
        return Attention(c, Linear(weight, bias), Linear(out_weight, out_bias), *norms)

    def mlp(self, prefix: str, intermediate: int) -> MLP:
        hidden = self.config.hidden_size
        gate_up = [self.tensor(f"{prefix}.{part}.weight", intermediate, hidden) for part in ("gate_proj", "up_proj")]
        return MLP(Linear(torch.cat(gate_up)), Linear(self.tensor(f"{prefix}.down_proj.weight", hidden, intermediate)))

    def moe(self, index: int) -> MoELayer:
        c, moe = self.config, self.config.moe
        prefix = self._block_prefix(index)
        row = c.moe_layers.index(index)
        router_dtype = torch.float32 if moe.router_float32 else self.dtype
        weight_ED = self.tensor(f"{prefix}.gate.weight", moe.num_experts, c.hidden_size, dtype=router_dtype)
        bias_E = None
        if moe.correction_bias:
            name = f"{prefix}.gate.e_score_correction_bias"
            bias_E = self.tensor(name, moe.num_experts, dtype=torch.float32)
        slots_WS = self.placement.slots[row]
        experts = ExpertSlots(slots_WS.shape[1], c.hidden_size, moe.intermediate_size, self.dtype, self.device)
        for slot, expert in enumerate(slots_WS[self.rank].tolist()):
            if expert >= 0:
                experts.load(slot, *self.expert(index, expert))
        shared = None
        if moe.shared_intermediate_size:
            shared = self.mlp(f"{prefix}.shared_experts", moe.shared_intermediate_size)
        slot_E = torch.from_numpy(self.placement.first_slot[row]).to(device=self.device, dtype=torch.int64)
        return MoELayer(
            row, Gate(moe, weight_ED, bias_E), slot_E, experts, shared, dict(self.dispatchers), self.counter
        )

    def expert(self, index: int, expert: int) -> tuple[Tensor, Tensor]:
        """`(w13_GD, w2_DF)` of one logical expert, stored by itself or fused with the others of its layer."""
        hidden, inner, total = self.config.hidden_size, self.config.moe.intermediate_size, self.config.moe.num_experts
        fused = f"model.layers.{index}.mlp.experts"
        if self.source.has(f"{fused}.gate_up_proj"):
            w13_GD = self.source.read(f"{fused}.gate_up_proj", (total, 2 * inner, hidden), expert)
            return w13_GD, self.source.read(f"{fused}.down_proj", (total, hidden, inner), expert)
        prefix, names = f"{self._block_prefix(index)}.experts.{expert}", self.names
        gate_up = [self.source.read(f"{prefix}.{part}.weight", (inner, hidden)) for part in (names.gate, names.up)]
        return torch.cat(gate_up), self.source.read(f"{prefix}.{names.down}.weight", (hidden, inner))

    @property
    def names(self) -> ExpertNames:
        names: ExpertNames = family_module(self.config.family).EXPERT_NAMES
        return names

    def _block_prefix(self, index: int) -> str:
        """The sparse block's prefix: the family's own, or the one that newer checkpoints of all families use."""
        prefix = f"model.layers.{index}.{self.names.block}"
        return prefix if self.source.has(f"{prefix}.gate.weight") else f"model.layers.{index}.mlp"
