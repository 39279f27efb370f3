"""Makes the parts of a decoder in torch, on any device.

Shape suffixes: D hidden, E logical experts, B sequences, V vocabulary, N rows, r rotary dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.all2all.dispatch import TORCH_ROWS, Dispatcher, RowOps
from moe_runtime.config.attention import AttentionConfig, LatentAttentionConfig
from moe_runtime.config.model import MoEConfig
from moe_runtime.experts.slots import ExpertSlots
from moe_runtime.kernels import ops, torch_ops
from moe_runtime.kernels.forms import INVARIANT, USUAL, Forms
from moe_runtime.kernels.quantized_slots import Matrix, empty_matrix
from moe_runtime.kernels.swiglu import SwiGLU
from moe_runtime.layers.batch import Batch
from moe_runtime.layers.capacity import LayerLimits
from moe_runtime.layers.decoder import LayerLoop
from moe_runtime.layers.gate import TorchGate
from moe_runtime.layers.kit import MLP, DecoderLayer, Experts, Gate, HeadMatrices, Linear, Norm
from moe_runtime.layers.kv_cache import KVCache
from moe_runtime.layers.moe import MoELayer
from moe_runtime.layers.rotary import RotaryEmbedding
from moe_runtime.layers.torch_attention import (
    AttentionStep,
    TorchAttention,
    TorchHeadMatrices,
    TorchLatentAttention,
)
from moe_runtime.layers.torch_layers import (
    RMSNorm,
    TorchDenseBlock,
    TorchEmbedding,
    TorchHead,
    TorchLinear,
    TorchMLP,
)
from moe_runtime.types.weight_format import DENSE, BlockFormats, WeightFormat


@dataclass(frozen=True)
class TorchKit:
    """See `layers.kit.Kit`. With `batch_invariant` a row has the same bits in any batch and any cut of its prompt."""

    dtype: torch.dtype
    device: torch.device
    batch_invariant: bool = False

    @property
    def forms(self) -> Forms:
        return INVARIANT if self.batch_invariant else USUAL

    @property
    def num_threads(self) -> int:
        return torch.get_num_threads()

    @property
    def row_ops(self) -> RowOps:
        return TORCH_ROWS

    def describe(self) -> dict[str, str]:
        """The implementation of each op, and the number of tiles tuned on this kind of GPU, read from the file now."""
        found = ops.describe(self.device)
        if ops.uses_triton(self.device):
            from moe_runtime.kernels.triton.tuned import tuned_tiles

            found["tuned tiles"] = str(len(tuned_tiles(self.device)))
        return found

    def linear(
        self, outputs: int, inputs: int, bias: Tensor | None = None, format: WeightFormat | None = None
    ) -> TorchLinear:
        weight: Matrix
        if format is None:
            weight = torch.empty(outputs, inputs, dtype=self.dtype, device=self.device)
        else:
            weight = empty_matrix(format, outputs, inputs, self.device)
        return TorchLinear(weight, bias, self.forms)

    def head(
        self, vocab_size: int, hidden_size: int, format: WeightFormat | None = None
    ) -> tuple[TorchHead, TorchLinear]:
        linear = self.linear(vocab_size, hidden_size, format=format)
        return TorchHead(linear), linear

    def embedding(self, weight_VD: Tensor) -> TorchEmbedding:
        return TorchEmbedding(weight_VD)

    def norm(self, weight_D: Tensor, eps: float, residual_multiplier: float) -> RMSNorm:
        return RMSNorm(weight_D, eps, residual_multiplier)

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
    ) -> TorchAttention:
        assert isinstance(qkv, TorchLinear) and isinstance(output, TorchLinear)
        return TorchAttention(config, eps, qkv, output, q_norm, k_norm, sinks_H, next_norm, self.forms)

    def head_matrices(self, num_heads: int, outputs: int, inputs: int) -> TorchHeadMatrices:
        return TorchHeadMatrices(torch.empty(num_heads, outputs, inputs, dtype=self.dtype, device=self.device))

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
    ) -> TorchLatentAttention:
        assert isinstance(down, TorchLinear) and isinstance(output, TorchLinear)
        assert up is None or isinstance(up, TorchLinear)
        assert isinstance(key, TorchHeadMatrices) and isinstance(value, TorchHeadMatrices)
        return TorchLatentAttention(
            config, down, up, key, value, output, query_norm, latent_norm, next_norm, self.forms
        )

    def attention_steps(self, batch: Batch, rope: RotaryEmbedding) -> list[AttentionStep]:
        cos_Nr, sin_Nr, row_T = rope.rows(batch.position_T, batch.num_prompt_T, batch.max_context)
        if row_T is not None:
            cos_Nr, sin_Nr = cos_Nr[row_T], sin_Nr[row_T]
        scale_T = rope.query_scale(batch.position_T)
        return [
            AttentionStep(cos_Nr, sin_Nr, pages.cache_position_T, pages.attention, scale_T) for pages in batch.pages
        ]

    def argmax(self, logits_BV: Tensor) -> list[int]:
        return torch_ops.argmax(logits_BV)

    def bind(self, layers: list[DecoderLayer], cache: KVCache) -> LayerLoop:
        return LayerLoop(layers, cache)

    def mlp(
        self,
        hidden_size: int,
        intermediate_size: int,
        gate_D: Tensor | None = None,
        formats: BlockFormats = DENSE,
    ) -> TorchMLP:
        gate_up = self.linear(2 * intermediate_size, hidden_size, format=formats.input)
        return TorchMLP(gate_up, self.linear(hidden_size, intermediate_size, format=formats.output), gate_D)

    def dense_block(self, mlp: MLP, next_norm: Norm) -> TorchDenseBlock:
        return TorchDenseBlock(mlp, next_norm)

    def experts(self, num_slots: int, hidden_size: int, moe: MoEConfig, formats: BlockFormats = DENSE) -> ExpertSlots:
        return ExpertSlots(
            num_slots,
            hidden_size,
            moe.intermediate_size,
            self.dtype,
            self.device,
            self.forms,
            swiglu=SwiGLU(moe.swiglu_alpha, moe.swiglu_limit, moe.swiglu_offset),
            has_bias=moe.expert_bias,
            formats=formats,
        )

    def gate(
        self,
        config: MoEConfig,
        weight_ED: Tensor,
        logit_bias_E: Tensor | None,
        correction_bias_E: Tensor | None,
        counts_2E: Tensor | None,
        layer: int,
    ) -> TorchGate:
        return TorchGate(config, weight_ED, logit_bias_E, correction_bias_E, counts_2E, layer, self.forms)

    def sparse_block(
        self,
        gate: Gate,
        slot_E: Tensor,
        experts: Experts,
        shared: MLP | None,
        next_norm: Norm,
        dispatchers: Mapping[str, Dispatcher],
        limits: LayerLimits | None,
    ) -> MoELayer:
        return MoELayer(gate, slot_E, experts, shared, next_norm, dispatchers, limits)
