"""The parts of a decoder: the protocols that the parts of every kit follow, and the kit that makes them.

Parts work only with parts of the same kit. A block includes the norm after it: it takes and returns the residual rows.
`nbytes` are bytes of weights.

Shape suffixes: T tokens, D hidden, F intermediate, E logical experts, K experts per token, S slots, V vocabulary,
N rows, R computations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher, RowOps
from moe_runtime.config.attention import AttentionConfig, LatentAttentionConfig
from moe_runtime.config.model import MoEConfig
from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels.quantized_slots import Matrix
from moe_runtime.layers.batch import Batch, StepPolicies
from moe_runtime.layers.capacity import LayerLimits
from moe_runtime.layers.kv_cache import KVCache, LayerCache
from moe_runtime.layers.rotary import RotaryEmbedding
from moe_runtime.types.weight_format import DENSE, BlockFormats, WeightFormat


class Linear(Protocol):
    """A linear map. Its weight is put in by rows, in pieces of whole panels (see `kernels.cpu.packed.PANEL`)."""

    @property
    def nbytes(self) -> int: ...

    def put(self, first_row: int, weight_ND: Matrix, /) -> None:
        """Fill the outputs from `first_row` on, in the weight's format."""


class HeadMatrices(Protocol):
    """A matrix of each attention head."""

    def put(self, head: int, first_row: int, weight_OI: Tensor, /) -> None:
        """Fill the outputs of one head from `first_row` on."""


class Norm(Protocol):
    """RMS norm of rows, and the sum with the residual rows before it."""

    def __call__(self, x_TD: Tensor, /) -> Tensor: ...

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `residual + residual_multiplier * x`, and that sum; they may overwrite `x` and `residual`."""


class Embedding(Protocol):
    """Token ids to rows."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, token_T: Tensor, /) -> Tensor: ...


class Head(Protocol):
    """Rows to logits `[T, V]` in float32."""

    @property
    def nbytes(self) -> int: ...

    def tied_embedding(self) -> Embedding:
        """The embedding that shares this head's weight, which must be dense."""

    def __call__(self, x_TD: Tensor, /) -> Tensor: ...


class AttentionBlock(Protocol):
    """Attention and the norm after it."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: object, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """The normed rows and the residual rows; `step` is that of the layer's page group, of `attention_steps`."""


class MLP(Protocol):
    """SwiGLU. Its weights are put in like those of an expert in slot 0."""

    @property
    def nbytes(self) -> int: ...

    def put(self, slot: int, part: ExpertPart, first_row: int, rows: Matrix, /) -> None: ...

    def __call__(self, x_TD: Tensor, /) -> Tensor: ...


class MLPBlock(Protocol):
    """A sparse or a dense MLP and the norm after it."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The normed rows and the residual rows."""


class Gate(Protocol):
    """Chooses logical experts, and counts them."""

    @property
    def nbytes(self) -> int: ...

    def __call__(
        self, x_TD: Tensor, num_decode: int, policies: StepPolicies | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(weights_TK float32, experts_TK int64, logits_TE)`, best expert first.

        An expert is -1 where the token's policy drops it. The first `num_decode` rows are decode rows.
        """


class Experts(Protocol):
    """This rank's slots of a layer; `formats` are those of their matrices."""

    formats: BlockFormats

    @property
    def num_slots(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def put(self, slot: int, part: ExpertPart, first_row: int, rows: Matrix, /) -> None:
        """Copy rows of one of an expert's matrices into a slot, in the slots' format and pieces of whole panels."""

    def stored(self, slot: int) -> tuple[Tensor, ...]:
        """A slot's content as stored in memory; the same on every rank for the same expert."""

    def __call__(self, x_ND: Tensor, row_R: Tensor | None, counts_S: Tensor, room_RD: Tensor | None = None) -> Tensor:
        """The experts' rows `[R, D]` of `x_ND[row_R]`, which is grouped by slot; they may be written into `room_RD`."""


class SparseBlock(MLPBlock, Protocol):
    """A sparse MLP over the experts of all ranks, and the norm after it."""

    @property
    def gate(self) -> Gate: ...

    @property
    def experts(self) -> Experts: ...

    def use_replicas(self, expert: int, slots: list[int]) -> None:
        """From the next call on, send an expert's tokens to these global slots in turn; their number divides 64."""


@dataclass(frozen=True)
class DecoderLayer:
    """Attention, then a sparse or a dense MLP, each with the norm after it."""

    attention: AttentionBlock
    mlp: MLPBlock


HiddenRows = Callable[[], Tensor]  # waits until the rows are ready


class LayerRunner(Protocol):
    """All layers of a decoder over one cache."""

    def begin(self, x_TD: Tensor, residual_TD: Tensor, steps: Sequence[Any], batch: Batch) -> HiddenRows:
        """Start; the rows are those after the last norm. `x_TD` and `residual_TD` may be overwritten."""


class StepMaker(Protocol):
    """See `Kit.attention_steps`."""

    def __call__(self, batch: Batch, rope: RotaryEmbedding) -> list[Any]: ...


class Kit(Protocol):
    """Makes the parts of a decoder in one implementation; weights are put into them afterwards.

    A `format` is that of weights; None is the kit's own, of its dtype. `formats` are those of an MLP's matrices.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def num_threads(self) -> int:
        """Threads that compute on the CPU."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a row has the same bits in any batch, chunk and rank."""

    @property
    def row_ops(self) -> RowOps:
        """The local work of dispatchers."""

    def describe(self) -> dict[str, str]:
        """The implementation of each op."""

    def linear(
        self, outputs: int, inputs: int, bias: Tensor | None = None, format: WeightFormat | None = None
    ) -> Linear: ...

    def head(self, vocab_size: int, hidden_size: int, format: WeightFormat | None = None) -> tuple[Head, Linear]:
        """The head, and the linear map that its weight is put into."""

    def embedding(self, weight_VD: Tensor) -> Embedding: ...

    def norm(self, weight_D: Tensor, eps: float, residual_multiplier: float) -> Norm: ...

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
    ) -> AttentionBlock:
        """Attention from its projections: one to query, key and value rows, in this order, and the output projection.

        Args:
            eps: of the norms on queries and keys.
            q_norm, k_norm: weights of the sizes `config.norm_sizes`, or None.
            sinks_H: float32, each head's sink, or None.
            next_norm: the norm after it.
        """

    def head_matrices(self, num_heads: int, outputs: int, inputs: int) -> HeadMatrices: ...

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
    ) -> AttentionBlock:
        """Latent attention from its projections.

        Args:
            down: to the compressed queries (or to the queries), the latent and the shared key, in this order.
            up: from the compressed queries to the queries, or None.
            key, value: matrices of each head, `[latent, nope]` and `[value, latent]`.
            query_norm, latent_norm: weights of the norms on compressed queries and on the latent.
            next_norm: the norm after it.
        """

    def attention_steps(self, batch: Batch, rope: RotaryEmbedding) -> list[Any]:
        """A step's input to attention, for each page group."""

    def argmax(self, logits_BV: Tensor) -> list[int]:
        """The best token of each row, -1 for a row with a value that is NaN or infinite."""

    def bind(self, layers: list[DecoderLayer], cache: KVCache) -> LayerRunner: ...

    def mlp(
        self,
        hidden_size: int,
        intermediate_size: int,
        gate_D: Tensor | None = None,
        formats: BlockFormats = DENSE,
    ) -> MLP:
        """SwiGLU. With `gate_D`, a row's output is multiplied by the sigmoid of its product with the gate."""

    def dense_block(self, mlp: MLP, next_norm: Norm) -> MLPBlock: ...

    def experts(self, num_slots: int, hidden_size: int, moe: MoEConfig, formats: BlockFormats = DENSE) -> Experts: ...

    def gate(
        self,
        config: MoEConfig,
        weight_ED: Tensor,
        logit_bias_E: Tensor | None,
        correction_bias_E: Tensor | None,
        counts_2E: Tensor | None,
        layer: int,
    ) -> Gate:
        """The gate; `logit_bias_E` is added to its product, in the weight's dtype."""

    def sparse_block(
        self,
        gate: Gate,
        slot_E: Tensor,
        experts: Experts,
        shared: MLP | None,
        next_norm: Norm,
        dispatchers: Mapping[str, Dispatcher],
        limits: LayerLimits | None,
    ) -> SparseBlock: ...
