"""The parts of a decoder in torch, on any device: linear maps, norms, attention, dense and sparse blocks.

`TorchKit` makes them; `layers.native_kit` makes the same on the native CPU kernels. Parts are plain objects that
hold tensors and are called; what a step brings comes as arguments. A block ends in the norm behind it: it takes and
gives the residual rows.

Shape suffixes: T tokens, D hidden, H query heads, G key/value heads, d head dim, r rotary dims, F intermediate,
E logical experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_runtime.all2all.dispatch import TORCH_ROWS, Dispatcher, RowOps
from moe_runtime.config.model import ModelConfig, MoEConfig
from moe_runtime.experts.parts import ExpertPart
from moe_runtime.experts.slots import ExpertSlots
from moe_runtime.kernels import ops
from moe_runtime.kernels.attention import DecodeRows
from moe_runtime.kernels.forms import INVARIANT, USUAL, Forms
from moe_runtime.layers.batch import Batch
from moe_runtime.layers.capacity import LayerLimits
from moe_runtime.layers.decoder import DecoderLayer, LayerLoop
from moe_runtime.layers.gate import Gate
from moe_runtime.layers.kv_cache import KVCache, LayerCache
from moe_runtime.layers.moe import Experts, MoELayer, Router, Shared
from moe_runtime.layers.rotary import RotaryEmbedding


class Linear:
    """`x @ weight.T + bias` with the weight `[outputs, inputs]`, whose rows are loaded piece by piece."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, forms: Forms = USUAL) -> None:
        self.weight = weight
        self.bias = bias
        self.forms = forms

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def load(self, first_row: int, weight_ND: Tensor) -> None:
        """Fill the outputs from `first_row` on."""
        self.weight[first_row : first_row + len(weight_ND)] = weight_ND

    def __call__(self, x: Tensor) -> Tensor:
        return self.forms.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class RMSNorm:
    """See `ops.rms_norm`."""

    weight_D: Tensor
    eps: float

    def __call__(self, x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, self.weight_D, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `residual + x`, and that sum."""
        return ops.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps)


class MLP:
    """SwiGLU: `down(silu(gate(x)) * up(x))`, gate and up in one product. Loaded as an expert in slot 0."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def load(self, slot: int, part: ExpertPart, first_row: int, rows: Tensor) -> None:
        """Copy rows of a weight."""
        assert slot == 0
        if part == "down":
            self.down.load(first_row, rows)
        else:
            self.gate_up.load(first_row + (self.down.weight.shape[1] if part == "up" else 0), rows)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.down(ops.silu_mul(self.gate_up(x_TD)))


class DenseBlock:
    """An MLP and the norm behind it."""

    def __init__(self, mlp: MLP, next_norm: RMSNorm) -> None:
        self.mlp = mlp
        self.next_norm = next_norm

    @property
    def nbytes(self) -> int:
        return self.mlp.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.next_norm.add(self.mlp(x_TD), residual_TD)


@dataclass(frozen=True)
class AttentionStep:
    """What one step's attention needs beside the model: angles in the model's dtype, cache positions, pages."""

    cos_Tr: Tensor
    sin_Tr: Tensor
    cache_position_T: Tensor
    metadata: ops.AttentionMetadata | DecodeRows


class Attention:
    """Grouped-query attention over the paged cache, with optional norms on queries and keys.

    Args:
        config: the model's.
        qkv: projection to `(H + 2 G) * d`; query rows, key rows, value rows.
        output: projection back.
        q_norm, k_norm: weights `[d]`, or None.
        next_norm: the norm behind.
        forms: of the attention itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        qkv: Linear,
        output: Linear,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        next_norm: RMSNorm,
        forms: Forms,
    ) -> None:
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.sliding_window = config.sliding_window
        self.qkv = qkv
        self.output = output
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.next_norm = next_norm
        self.forms = forms

    @property
    def nbytes(self) -> int:
        return self.qkv.nbytes + self.output.nbytes

    def __call__(
        self, x_TD: Tensor, residual_TD: Tensor, step: AttentionStep, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """Attend from each token to its sequence so far; the tokens' own keys and values go into the cache first."""
        heads = self.qkv(x_TD).view(x_TD.shape[0], sum(self.heads), self.head_dim)
        q_THd, k_TGd, v_TGd = heads.split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THd = ops.rms_norm(q_THd, self.q_norm, self.eps)
            k_TGd = ops.rms_norm(k_TGd, self.k_norm, self.eps)
        pages = (cache.k_NBGd, cache.v_NBGd)
        q_THd = ops.rotary_store_kv(q_THd, k_TGd, v_TGd, step.cos_Tr, step.sin_Tr, *pages, step.cache_position_T)
        out_THd = self._attend(q_THd, *pages, step.metadata)
        return self.next_norm.add(self.output(out_THd.flatten(1)), residual_TD)

    def _attend(
        self, q_THd: Tensor, k_NBGd: Tensor, v_NBGd: Tensor, meta: ops.AttentionMetadata | DecodeRows
    ) -> Tensor:
        scale, window = self.head_dim**-0.5, self.sliding_window
        if isinstance(meta, DecodeRows):
            where = (meta.page_table, meta.sequence_T, meta.position_T)
            return ops.decode_attention(
                q_THd, k_NBGd, v_NBGd, *where, max_context=meta.max_context, scale=scale, sliding_window=window
            )
        return self.forms.paged_attention(q_THd, k_NBGd, v_NBGd, meta, scale=scale, sliding_window=window)


class Embedding:
    """Rows of a weight `[V, D]` by token id."""

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight_VD = weight_VD

    @property
    def nbytes(self) -> int:
        return self.weight_VD.nbytes

    def __call__(self, token_T: Tensor) -> Tensor:
        return F.embedding(token_T, self.weight_VD)


class Head:
    """Logits in float32, computed and rounded in the model's dtype."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def tied_embedding(self) -> Embedding:
        """The embedding that shares this head's weight."""
        return Embedding(self.linear.weight)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.linear(x_TD).float()


@dataclass(frozen=True)
class TorchKit:
    """Makes the parts of a decoder in torch; weights are loaded into them afterwards.

    With `batch_invariant` a row has the same bits in any batch, however its prompt is cut.
    """

    dtype: torch.dtype
    device: torch.device
    batch_invariant: bool = False

    @property
    def forms(self) -> Forms:
        return INVARIANT if self.batch_invariant else USUAL

    @property
    def row_ops(self) -> RowOps:
        return TORCH_ROWS

    def describe(self) -> dict[str, str]:
        """The implementation of each op, and how many tiles were tuned on this kind of GPU, which are read now."""
        found = ops.describe(self.device)
        if ops.uses_triton(self.device):
            from moe_runtime.kernels.triton.tuned import tuned_tiles

            found["tuned tiles"] = str(len(tuned_tiles(self.device)))
        return found

    def linear(self, outputs: int, inputs: int, bias: Tensor | None = None) -> Linear:
        return Linear(torch.empty(outputs, inputs, dtype=self.dtype, device=self.device), bias, self.forms)

    def head(self, vocab_size: int, hidden_size: int) -> tuple[Head, Linear]:
        """The head, and what loads it."""
        linear = self.linear(vocab_size, hidden_size)
        return Head(linear), linear

    def norm(self, weight_D: Tensor, eps: float) -> RMSNorm:
        return RMSNorm(weight_D, eps)

    def attention(
        self,
        config: ModelConfig,
        qkv: Linear,
        output: Linear,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        next_norm: RMSNorm,
    ) -> Attention:
        return Attention(config, qkv, output, q_norm, k_norm, next_norm, self.forms)

    def attention_step(self, batch: Batch, rope: RotaryEmbedding) -> AttentionStep:
        """What all layers of a step share."""
        cos_Nr, sin_Nr, row_T = rope.rows(batch.position_T, batch.num_prompt_T, batch.attention.max_context)
        if row_T is not None:
            cos_Nr, sin_Nr = cos_Nr[row_T], sin_Nr[row_T]
        return AttentionStep(cos_Nr.to(self.dtype), sin_Nr.to(self.dtype), batch.cache_position_T, batch.attention)

    def argmax(self, logits_BV: Tensor) -> list[int]:
        """The best token of each row."""
        tokens: list[int] = logits_BV.argmax(dim=-1).tolist()
        return tokens

    def bind(self, layers: list[DecoderLayer], cache: KVCache) -> LayerLoop:
        return LayerLoop(layers, cache)

    def mlp(self, hidden_size: int, intermediate_size: int) -> MLP:
        gate_up = self.linear(2 * intermediate_size, hidden_size)
        return MLP(gate_up, self.linear(hidden_size, intermediate_size))

    def dense_block(self, mlp: MLP, next_norm: RMSNorm) -> DenseBlock:
        return DenseBlock(mlp, next_norm)

    def experts(self, num_slots: int, hidden_size: int, intermediate_size: int) -> ExpertSlots:
        return ExpertSlots(num_slots, hidden_size, intermediate_size, self.dtype, self.device, self.forms)

    def gate(
        self,
        config: MoEConfig,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        counts_2E: Tensor | None,
        layer: int,
    ) -> Gate:
        return Gate(config, weight_ED, bias_E, counts_2E, layer, self.forms)

    def sparse_block(
        self,
        gate: Router,
        slot_E: Tensor,
        experts: Experts,
        shared: Shared | None,
        next_norm: RMSNorm,
        dispatchers: Mapping[str, Dispatcher],
        limits: LayerLimits | None,
    ) -> MoELayer:
        return MoELayer(gate, slot_E, experts, shared, next_norm, dispatchers, limits)
