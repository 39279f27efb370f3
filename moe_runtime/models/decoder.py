"""The decoder that all families share.

Shape suffixes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moe_runtime.batch import Batch
from moe_runtime.kv_cache import KVCache, LayerCache
from moe_runtime.rotary import RotaryEmbedding


class AttentionBlock(Protocol):
    """Attention and the norm behind it."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: Any, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """The normed rows and the residual rows; `step` is what the kit's `attention_step` gave."""


class MLPBlock(Protocol):
    """A sparse or a dense MLP and the norm behind it."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The normed rows and the residual rows."""


class RowMap(Protocol):
    """The embedding, the head, or the first norm."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


class StepMaker(Protocol):
    """See `Kit.attention_step`."""

    def __call__(self, batch: Batch, rope: RotaryEmbedding) -> Any: ...


@dataclass(frozen=True)
class DecoderLayer:
    """Attention, then a sparse or a dense MLP, each with the norm behind it."""

    attention: AttentionBlock
    mlp: MLPBlock


class LayerRunner(Protocol):
    """All layers of a decoder over one cache."""

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: Any, batch: Batch) -> Tensor:
        """The rows after the last norm. `x_TD` and `residual_TD` may be overwritten."""


class LayerLoop:
    """Runs layers one after the other."""

    def __init__(self, layers: list[DecoderLayer], cache: KVCache) -> None:
        self.layers = layers
        self.cache = cache

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: Any, batch: Batch) -> Tensor:
        for index, layer in enumerate(self.layers):
            x_TD, residual_TD = layer.attention(x_TD, residual_TD, step, self.cache.layer(index))
            x_TD, residual_TD = layer.mlp(x_TD, residual_TD, batch)
        return x_TD


@dataclass(frozen=True)
class Decoder:
    """A causal language model over the paged cache.

    Attributes:
        embed: token ids to rows `[T, D]`.
        first_norm: that of the first layer; every block brings the one behind it.
        sparse_blocks: the layers' sparse MLPs, in order; `moe.MoELayer` where there are several ranks.
        head: rows to logits `[T, V]` in float32.
        attention_step: makes what all layers of a step share.
        nbytes: of the weights that this rank holds.
    """

    embed: RowMap
    first_norm: RowMap
    layers: list[DecoderLayer]
    sparse_blocks: list[Any]
    head: RowMap
    rope: RotaryEmbedding
    attention_step: StepMaker
    nbytes: int

    def forward(self, batch: Batch, run_layers: LayerRunner) -> Tensor:
        """Hidden states `[T, D]` after the last norm. All ranks call it for the same step, also without tokens.

        `run_layers` is what the kit's `bind` makes of `layers` and a cache.
        """
        step = self.attention_step(batch, self.rope)
        residual_TD = self.embed(batch.token_T)
        return run_layers(self.first_norm(residual_TD), residual_TD, step, batch)

    def logits(self, x_TD: Tensor) -> Tensor:
        """`[T, V]` in float32."""
        return self.head(x_TD)
