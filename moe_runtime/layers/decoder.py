"""The decoder that all families share.

Shape suffixes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_runtime.layers.batch import Batch
from moe_runtime.layers.kit import (
    DecoderLayer,
    Embedding,
    Head,
    HiddenRows,
    LayerRunner,
    Norm,
    SparseBlock,
    StepMaker,
)
from moe_runtime.layers.kv_cache import KVCache
from moe_runtime.layers.rotary import RotaryEmbedding


class LayerLoop:
    """Runs layers one after another, immediately."""

    def __init__(self, layers: list[DecoderLayer], cache: KVCache) -> None:
        self.layers = layers
        self.cache = cache

    def begin(self, x_TD: Tensor, residual_TD: Tensor, steps: Sequence[object], batch: Batch) -> HiddenRows:
        for index, (group, layer) in enumerate(zip(self.cache.page_groups, self.layers, strict=True)):
            x_TD, residual_TD = layer.attention(x_TD, residual_TD, steps[group], self.cache.layer(index))
            x_TD, residual_TD = layer.mlp(x_TD, residual_TD, batch)
        return lambda: x_TD


@dataclass(frozen=True)
class Decoder:
    """A causal language model over the paged cache.

    Attributes:
        first_norm: the norm before the first layer; every block has the norm after it.
        sparse_blocks: the layers' sparse MLPs, in order.
        attention_steps: makes a step's input to attention, for each page group.
        nbytes: bytes of this rank's weights.
        embedding_multiplier, logits_scaling: see `ModelConfig`.
    """

    embed: Embedding
    first_norm: Norm
    layers: list[DecoderLayer]
    sparse_blocks: list[SparseBlock]
    head: Head
    rope: RotaryEmbedding
    attention_steps: StepMaker
    nbytes: int
    embedding_multiplier: float
    logits_scaling: float

    def begin(self, token_T: Tensor, batch: Batch, steps: Sequence[object], layers: LayerRunner) -> HiddenRows:
        """Start on tokens, int64 ids; the rows are hidden states `[T, D]` after the last norm.

        All ranks call it for the same step, even without tokens. `steps` is the result of `attention_steps`; `layers`
        is what the kit's `bind` made from the layers and a cache.
        """
        residual_TD = self.embed(token_T)
        if self.embedding_multiplier != 1.0:
            residual_TD = residual_TD * self.embedding_multiplier
        return layers.begin(self.first_norm(residual_TD), residual_TD, steps, batch)

    def logits(self, x_TD: Tensor) -> Tensor:
        """`[T, V]` in float32."""
        logits_TV = self.head(x_TD)
        return logits_TV if self.logits_scaling == 1.0 else logits_TV / self.logits_scaling
