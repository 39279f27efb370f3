"""The parts of a decoder on the native CPU kernels; `moe_runtime.layers` has the same in torch.

Blocks add to the residual rows in place. Shape suffixes: T tokens, D hidden, E logical experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher, RowOps
from moe_runtime.batch import Batch, StepRouting
from moe_runtime.capacity import LayerLimits
from moe_runtime.config import ModelConfig, MoEConfig
from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels import ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.cpu.blocks import (
    AttentionBlock,
    DenseBlock,
    Layers,
    NextNorm,
    Router,
    Routing,
    SparseBlock,
)
from moe_runtime.kernels.cpu.native import Kernels, Step, gate_config
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear
from moe_runtime.kv_cache import KVCache, LayerCache
from moe_runtime.models.decoder import DecoderLayer, LayerLoop
from moe_runtime.moe import MoELayer
from moe_runtime.rotary import RotaryEmbedding


@dataclass(frozen=True)
class NativeNorm:
    """See `ops.rms_norm`."""

    kernels: Kernels
    weight_D: Tensor
    eps: float

    @property
    def behind(self) -> NextNorm:
        """As the blocks take it."""
        return NextNorm(self.weight_D, self.eps)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.kernels.rms_norm(x_TD, self.weight_D, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `residual + x`, and that sum, in the places of `x` and `residual`."""
        return self.kernels.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps, in_place=True)


class NativeAttention:
    """See `layers.Attention`."""

    def __init__(self, block: AttentionBlock) -> None:
        self.block = block

    @property
    def nbytes(self) -> int:
        return self.block.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, Tensor]:
        return self.block(x_TD, step, cache.k_NBGd, cache.v_NBGd, residual_TD, in_place=True), residual_TD


class NativeMLP:
    """SwiGLU; loaded as an expert in slot 0."""

    def __init__(self, experts: PackedExperts) -> None:
        self.experts = experts
        self._block = DenseBlock(experts)

    @property
    def nbytes(self) -> int:
        return self.experts.nbytes

    def load(self, slot: int, part: ExpertPart, first_row: int, rows: Tensor) -> None:
        """Pack rows of a weight."""
        self.experts.load(slot, part, first_row, rows)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._block(x_TD)


class NativeDenseBlock:
    """An MLP and the norm behind it, in one call."""

    def __init__(self, mlp: NativeMLP, next_norm: NativeNorm) -> None:
        self.mlp = mlp
        self.block = DenseBlock(mlp.experts, next_norm.behind)

    @property
    def nbytes(self) -> int:
        return self.mlp.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.block(x_TD, residual_TD), residual_TD


class NativeGate:
    """See `gate.Gate`."""

    def __init__(self, router: Router, layer: int) -> None:
        self.router = router
        self.layer = layer

    @property
    def nbytes(self) -> int:
        return self.router.nbytes

    def logits(self, x_TD: Tensor) -> Tensor:
        return self.router.logits(x_TD)

    def __call__(self, x_TD: Tensor, num_decode: int, routing: StepRouting | None = None) -> tuple[Tensor, Tensor]:
        return self.router(x_TD, num_decode, _of_layer(routing, self.layer))


def _of_layer(routing: StepRouting | None, layer: int) -> Routing:
    if routing is None:
        return Routing()
    policies, chosen = routing.policies_LP4, routing.chosen_LTK
    return Routing(
        routing.policy_T, None if policies is None else policies[layer], None if chosen is None else chosen[layer]
    )


class NativeSparseBlock:
    """The sparse block of a rank that holds all experts, and the norm behind it, in one call."""

    def __init__(self, block: SparseBlock, gate: NativeGate) -> None:
        self.block = block
        self.gate = gate
        self.experts = block.experts

    @property
    def nbytes(self) -> int:
        parts = (self.block.router, self.block.experts, self.block.shared)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.dispatcher == "local"
        routing = _of_layer(batch.routing, self.gate.layer)
        return self.block(x_TD, batch.num_decode, residual_TD, routing), residual_TD


class FusedLayers:
    """All layers of a rank that holds all experts, in one call; see `models.decoder.LayerRunner`."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: Step, batch: Batch) -> Tensor:
        assert batch.dispatcher == "local"
        routing = batch.routing and [_of_layer(batch.routing, layer) for layer in range(self._layers.num_sparse)]
        self._layers(x_TD, residual_TD, step, batch.num_decode, routing or ())
        return x_TD


class NativeHead:
    """Logits in float32, never rounded to the model's dtype."""

    def __init__(self, linear: PackedLinear) -> None:
        self.linear = linear

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def tied_embedding(self) -> NativeEmbedding:
        """The embedding that shares this head's weight."""
        return NativeEmbedding(self.linear)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.linear(x_TD, float32=True)


class NativeEmbedding:
    """Rows of a packed weight `[V, D]` by token id."""

    def __init__(self, linear: PackedLinear) -> None:
        self.linear = linear

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def __call__(self, token_T: Tensor) -> Tensor:
        return self.linear.take_rows(token_T)


@dataclass(frozen=True)
class NativeKit:
    """Makes the parts of a decoder on the native CPU kernels; weights are loaded, and packed, into them afterwards."""

    kernels: Kernels
    dtype: torch.dtype

    device = torch.device("cpu")

    @property
    def row_ops(self) -> RowOps:
        return RowOps(self.kernels.group_by_slot, self.kernels.combine)

    def describe(self) -> dict[str, str]:
        """The implementation of each op."""
        return dict.fromkeys(ops.describe(self.device), f"native {self.kernels.instruction_set}")

    def linear(self, outputs: int, inputs: int, bias: Tensor | None = None) -> PackedLinear:
        return PackedLinear(self.kernels, outputs, inputs, self.dtype, bias)

    def head(self, vocab_size: int, hidden_size: int) -> tuple[NativeHead, PackedLinear]:
        """The head, and what loads it."""
        linear = self.linear(vocab_size, hidden_size)
        return NativeHead(linear), linear

    def norm(self, weight_D: Tensor, eps: float) -> NativeNorm:
        return NativeNorm(self.kernels, weight_D, eps)

    def attention(
        self,
        config: ModelConfig,
        qkv: PackedLinear,
        output: PackedLinear,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        next_norm: NativeNorm,
    ) -> NativeAttention:
        block = AttentionBlock(
            self.kernels,
            qkv,
            output,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            sliding_window=config.sliding_window,
            q_norm_d=q_norm,
            k_norm_d=k_norm,
            eps=config.rms_norm_eps,
            next_norm=next_norm.behind,
        )
        return NativeAttention(block)

    def attention_step(self, batch: Batch, rope: RotaryEmbedding) -> Step:
        """What all layers of a step share."""
        assert isinstance(batch.attention, AttentionMetadata)
        angles = rope.rows(batch.position_T, batch.num_prompt_T, batch.attention.max_context)
        return Step(batch.attention, batch.slot_T, *angles)

    def argmax(self, logits_BV: Tensor) -> list[int]:
        """The best token of each row."""
        return self.kernels.argmax(logits_BV)

    def bind(self, layers: list[DecoderLayer], cache: KVCache) -> LayerLoop | FusedLayers:
        """In one call where all experts are here."""
        blocks = []
        for layer in layers:
            attention, mlp = layer.attention, layer.mlp
            if not isinstance(attention, NativeAttention) or not isinstance(mlp, NativeSparseBlock | NativeDenseBlock):
                return LayerLoop(layers, cache)
            blocks.append((attention.block, mlp.block))
        pages = [cache.layer(index) for index in range(len(layers))]
        return FusedLayers(Layers(blocks, [(layer.k_NBGd, layer.v_NBGd) for layer in pages]))

    def mlp(self, hidden_size: int, intermediate_size: int) -> NativeMLP:
        return NativeMLP(self.experts(1, hidden_size, intermediate_size))

    def dense_block(self, mlp: NativeMLP, next_norm: NativeNorm) -> NativeDenseBlock:
        return NativeDenseBlock(mlp, next_norm)

    def experts(self, num_slots: int, hidden_size: int, intermediate_size: int) -> PackedExperts:
        return PackedExperts(self.kernels, num_slots, hidden_size, intermediate_size, self.dtype)

    def gate(
        self,
        config: MoEConfig,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        slot_E: Tensor,
        counts_2E: Tensor | None,
        layer: int,
    ) -> NativeGate:
        gate = gate_config(
            config.num_experts,
            top_k=config.top_k,
            scoring=config.scoring,
            correction_bias_E=bias_E,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            normalize=config.normalize_topk,
            scale=config.routed_scaling_factor,
        )
        return NativeGate(Router(self.kernels, gate, weight_ED, slot_E, counts_2E), layer)

    def sparse_block(
        self,
        gate: NativeGate,
        slot_E: Tensor,
        experts: PackedExperts,
        shared: NativeMLP | None,
        next_norm: NativeNorm,
        dispatchers: Mapping[str, Dispatcher],
        limits: LayerLimits | None,
    ) -> MoELayer | NativeSparseBlock:
        all_are_here = int(slot_E.max()) < experts.num_slots
        if all_are_here and set(dispatchers) == {"local"} and limits is None:
            whole = SparseBlock(gate.router, experts, shared.experts if shared else None, next_norm.behind)
            return NativeSparseBlock(whole, gate)
        return MoELayer(gate, slot_E, experts, shared, next_norm, dispatchers, limits)
