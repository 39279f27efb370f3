"""The decoder that all families share.

Shape suffixes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moe_runtime.layers.batch import Batch
from moe_runtime.layers.kv_cache import KVCache, LayerCache
from moe_runtime.layers.rotary import RotaryEmbedding


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


Rows = Callable[[], Tensor]  # waits until rows are there


class LayerRunner(Protocol):
    """All layers of a decoder over one cache."""

    def begin(self, x_TD: Tensor, residual_TD: Tensor, step: Any, batch: Batch) -> Rows:
        """Start; the rows are those after the last norm. `x_TD` and `residual_TD` may be overwritten."""


class LayerLoop:
    """Runs layers one after the other, at once."""

    def __init__(self, layers: list[DecoderLayer], cache: KVCache) -> None:
        self.layers = layers
        self.cache = cache

    def begin(self, x_TD: Tensor, residual_TD: Tensor, step: Any, batch: Batch) -> Rows:
        for index, layer in enumerate(self.layers):
            x_TD, residual_TD = layer.attention(x_TD, residual_TD, step, self.cache.layer(index))
            x_TD, residual_TD = layer.mlp(x_TD, residual_TD, batch)
        return lambda: x_TD


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

    def begin(self, token_T: Tensor, batch: Batch, step: Any, layers: LayerRunner) -> Rows:
        """Start on tokens, int64 ids; the rows are hidden states `[T, D]` after the last norm.

        All ranks call it for the same step, also without tokens. `step` is what `attention_step` gave, `layers` what
        the kit's `bind` makes of the layers and a cache.
        """
        residual_TD = self.embed(token_T)
        return layers.begin(self.first_norm(residual_TD), residual_TD, step, batch)

    def logits(self, x_TD: Tensor) -> Tensor:
        """`[T, V]` in float32."""
        return self.head(x_TD)
