"""Makes the parts of a decoder on the native CPU kernels.

Shape suffixes: D hidden, E logical experts, B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher, RowOps
from moe_runtime.config.attention import AttentionConfig, LatentAttentionConfig
from moe_runtime.config.model import MoEConfig
from moe_runtime.kernels import ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.cpu.blocks import AttentionCall, GateCall, SparseCall
from moe_runtime.kernels.cpu.kv_pages import kv_pages
from moe_runtime.kernels.cpu.latent import LatentCall
from moe_runtime.kernels.cpu.layers import Layers
from moe_runtime.kernels.cpu.native import Kernels, gate_config
from moe_runtime.kernels.cpu.native_step import NativeStep
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear, PackedMatrices
from moe_runtime.kernels.swiglu import SwiGLU
from moe_runtime.layers.batch import Batch
from moe_runtime.layers.capacity import LayerLimits
from moe_runtime.layers.decoder import LayerLoop
from moe_runtime.layers.kit import MLP, DecoderLayer, Experts, Gate, HeadMatrices, Linear, Norm
from moe_runtime.layers.kv_cache import KVCache
from moe_runtime.layers.moe import MoELayer
from moe_runtime.layers.native_layers import (
    FusedLayers,
    NativeAttention,
    NativeDenseBlock,
    NativeGate,
    NativeHead,
    NativeLatentAttention,
    NativeMLP,
    NativeMoELayer,
    NativeNorm,
    NativeSparseBlock,
)
from moe_runtime.layers.rotary import RotaryEmbedding
from moe_runtime.layers.sparse_form import SparseForm, native_sparse_form
from moe_runtime.layers.torch_layers import TorchEmbedding
from moe_runtime.types.weight_format import DENSE, BlockFormats, WeightFormat


@dataclass(frozen=True)
class NativeKit:
    """See `layers.kit.Kit`; weights are packed when they are put in. `int8_rows`: see `PackedMatrices`."""

    kernels: Kernels
    dtype: torch.dtype
    int8_rows: bool = False

    device = torch.device("cpu")
    batch_invariant = True

    @property
    def num_threads(self) -> int:
        return self.kernels.num_threads

    @property
    def row_ops(self) -> RowOps:
        return RowOps(self.kernels.group_by_slot, self.kernels.combine)

    def describe(self) -> dict[str, str]:
        """The implementation of each op."""
        return dict.fromkeys(ops.describe(self.device), f"native {self.kernels.instruction_set}")

    def linear(
        self, outputs: int, inputs: int, bias: Tensor | None = None, format: WeightFormat | None = None
    ) -> PackedLinear:
        return PackedLinear(self.kernels, outputs, inputs, self.dtype, bias, format, self.int8_rows)

    def head(
        self, vocab_size: int, hidden_size: int, format: WeightFormat | None = None
    ) -> tuple[NativeHead, PackedLinear]:
        """The head, and the linear map that its weight is put into."""
        linear = self.linear(vocab_size, hidden_size, format=format)
        return NativeHead(linear), linear

    def embedding(self, weight_VD: Tensor) -> TorchEmbedding:
        return TorchEmbedding(weight_VD)

    def norm(self, weight_D: Tensor, eps: float, residual_multiplier: float) -> NativeNorm:
        return NativeNorm(self.kernels, weight_D, eps, residual_multiplier)

    def attention(
        self,
        config: AttentionConfig,
        eps: float,
        qkv: Linear,
        output: Linear,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        sinks_H: Tensor | None,
        next_norm: Norm,
    ) -> NativeAttention:
        assert isinstance(qkv, PackedLinear) and isinstance(output, PackedLinear) and isinstance(next_norm, NativeNorm)
        call = AttentionCall(
            self.kernels,
            qkv,
            output,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.softmax_scale,
            sliding_window=config.sliding_window,
            qk_norm=config.qk_norm,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            next_norm=next_norm.after,
            sinks_H=sinks_H,
        )
        return NativeAttention(call)

    def head_matrices(self, num_heads: int, outputs: int, inputs: int) -> PackedMatrices:
        return PackedMatrices(self.kernels, self.dtype, outputs, inputs, num_heads)

    def latent_attention(
        self,
        config: LatentAttentionConfig,
        down: Linear,
        up: Linear | None,
        key: HeadMatrices,
        value: HeadMatrices,
        output: Linear,
        query_norm: Tensor | None,
        latent_norm: Tensor,
        next_norm: Norm,
    ) -> NativeLatentAttention:
        assert isinstance(down, PackedLinear) and isinstance(output, PackedLinear) and isinstance(next_norm, NativeNorm)
        assert up is None or isinstance(up, PackedLinear)
        assert isinstance(key, PackedMatrices) and isinstance(value, PackedMatrices)
        call = LatentCall(
            self.kernels,
            down,
            up,
            key,
            value,
            output,
            query_norm=query_norm,
            latent_norm=latent_norm,
            rope_size=config.rope_size,
            scale=config.scale,
            eps=config.norm_eps,
            next_norm=next_norm.after,
        )
        return NativeLatentAttention(call)

    def attention_steps(self, batch: Batch, rope: RotaryEmbedding) -> list[NativeStep]:
        angles = rope.rows(batch.position_T, batch.num_prompt_T, batch.max_context)
        scale_T, steps = rope.query_scale(batch.position_T), []
        for pages in batch.pages:
            assert isinstance(pages.attention, AttentionMetadata)
            steps.append(NativeStep(pages.attention, pages.cache_position_T, *angles, scale_T))
        return steps

    def argmax(self, logits_BV: Tensor) -> list[int]:
        return self.kernels.argmax(logits_BV)

    def bind(self, layers: list[DecoderLayer], cache: KVCache) -> LayerLoop | FusedLayers:
        """One native call for all layers, unless sparse blocks run only in parts."""
        loop, calls, form, symmetric = LayerLoop(layers, cache), [], SparseForm.WHOLE, None
        for layer in layers:
            attention, mlp = layer.attention, layer.mlp
            assert isinstance(attention, NativeAttention | NativeLatentAttention)
            if not isinstance(mlp, NativeSparseBlock | NativeDenseBlock | NativeMoELayer):
                return loop
            if isinstance(mlp, NativeMoELayer):
                form, symmetric = SparseForm.EXCHANGE, mlp.symmetric
            calls.append((attention.call, mlp.call))
        kept = [cache.layer(index) for index in range(len(layers))]
        pages = [kv_pages(layer.k_NBGd, layer.v_NBGe, layer.scales) for layer in kept]
        fused = Layers(calls, pages, cache.page_groups)
        return FusedLayers(fused, form, symmetric, loop)

    def mlp(
        self,
        hidden_size: int,
        intermediate_size: int,
        gate_D: Tensor | None = None,
        formats: BlockFormats = DENSE,
    ) -> NativeMLP:
        sizes, int8_rows = (hidden_size, intermediate_size), self.int8_rows
        return NativeMLP(
            PackedExperts(self.kernels, 1, *sizes, self.dtype, gate_D, formats=formats, int8_rows=int8_rows)
        )

    def dense_block(self, mlp: MLP, next_norm: Norm) -> NativeDenseBlock:
        assert isinstance(mlp, NativeMLP) and isinstance(next_norm, NativeNorm)
        return NativeDenseBlock(mlp, next_norm)

    def experts(self, num_slots: int, hidden_size: int, moe: MoEConfig, formats: BlockFormats = DENSE) -> PackedExperts:
        return PackedExperts(
            self.kernels,
            num_slots,
            hidden_size,
            moe.intermediate_size,
            self.dtype,
            swiglu=SwiGLU(moe.swiglu_alpha, moe.swiglu_limit, moe.swiglu_offset),
            has_bias=moe.expert_bias,
            formats=formats,
            int8_rows=self.int8_rows,
        )

    def gate(
        self,
        config: MoEConfig,
        weight_ED: Tensor,
        logit_bias_E: Tensor | None,
        correction_bias_E: Tensor | None,
        counts_2E: Tensor | None,
        layer: int,
    ) -> NativeGate:
        gate = gate_config(
            config.num_experts,
            top_k=config.top_k,
            scoring=config.scoring,
            correction_bias_E=correction_bias_E,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            groups_by_best=config.groups_by_best,
            normalize=config.normalize_topk,
            scale=config.routed_scaling_factor,
        )
        return NativeGate(GateCall(self.kernels, gate, weight_ED, counts_2E, logit_bias_E), layer)

    def sparse_block(
        self,
        gate: Gate,
        slot_E: Tensor,
        experts: Experts,
        shared: MLP | None,
        next_norm: Norm,
        dispatchers: Mapping[str, Dispatcher],
        limits: LayerLimits | None,
    ) -> MoELayer | NativeSparseBlock:
        assert isinstance(gate, NativeGate) and isinstance(experts, PackedExperts) and isinstance(next_norm, NativeNorm)
        assert shared is None or isinstance(shared, NativeMLP)
        holds_all = int(slot_E.max()) < experts.num_slots
        match native_sparse_form(holds_all=holds_all, dispatchers=dispatchers, has_limits=limits is not None):
            case SparseForm.WHOLE:
                shared_experts = None if shared is None else shared.experts
                call = SparseCall(gate.call, slot_E[:, None], experts, shared_experts, next_norm.after)
                return NativeSparseBlock(call, gate)
            case SparseForm.EXCHANGE:
                return NativeMoELayer(gate, slot_E, experts, shared, next_norm, dispatchers)
            case SparseForm.PARTS:
                return MoELayer(gate, slot_E, experts, shared, next_norm, dispatchers, limits)
