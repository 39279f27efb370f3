"""A checkpoint's configuration, with Hugging Face's different spellings normalised. No torch."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of `rotary_dim` of each head's dims. `kind` and its parameters are as in HF's configs."""

    theta: float
    rotary_dim: int
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class MoEConfig:
    """The sparse block of a layer: experts, gate and shared experts."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize_topk: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    correction_bias: bool = False
    gate_float32: bool = False


@dataclass(frozen=True)
class KVSpec:
    """The state that a layer keeps for each token of a sequence.

    Attributes:
        kind: with "full", all later tokens read it; with "window", only the next `window - 1` tokens do.
        bytes_per_token: size of one token's keys and values.
        window: number of tokens that a token attends to, including itself; None with "full".
    """

    kind: Literal["full", "window"]
    bytes_per_token: int
    window: int | None

    def tokens_read(self, context_len: int) -> int:
        """How many of `context_len` tokens the next token attends to."""
        return min(context_len, self.window or context_len)


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention of a layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False

    @property
    def query_size(self) -> int:
        """Outputs of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Outputs of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def kv_spec(self, itemsize: int) -> KVSpec:
        """The layer's state, in elements of `itemsize` bytes."""
        kind: Literal["full", "window"] = "full" if self.sliding_window is None else "window"
        return KVSpec(kind, 2 * self.kv_size * itemsize, self.sliding_window)


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: its attention, and the intermediate size of its dense MLP; None for a sparse layer."""

    attention: AttentionConfig
    dense_intermediate_size: int | None

    @property
    def is_sparse(self) -> bool:
        return self.dense_intermediate_size is None


def layers_alike(
    num_layers: int, attention: AttentionConfig, sparse: Container[int], dense_intermediate_size: int
) -> tuple[LayerConfig, ...]:
    """Layers with the same attention; those whose index is not in `sparse` have a dense MLP."""
    return tuple(
        LayerConfig(attention, None if index in sparse else dense_intermediate_size) for index in range(num_layers)
    )


@dataclass(frozen=True)
class ModelConfig:
    """One checkpoint's configuration, with Hugging Face's different spellings normalised.

    Attributes:
        eos_token_ids: tokens that end an output.
        default_sampling: fields of `SamplingParams` for requests that leave them out.
    """

    family: str
    vocab_size: int
    hidden_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    moe: MoEConfig
    layers: tuple[LayerConfig, ...]
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, float | int] = field(default_factory=dict, hash=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the sparse layers."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.is_sparse)

    def kv_specs(self, itemsize: int) -> list[KVSpec]:
        """The state that each layer keeps for a token, in elements of `itemsize` bytes."""
        return [layer.attention.kv_spec(itemsize) for layer in self.layers]

    @property
    def max_model_len(self) -> int:
        """Maximum context: the trained one, times the rope factor if the scaling is meant to extend the context."""
        if self.rope.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.kind == "yarn":
            return int(self.rope.original_max_position * self.rope.factor)
        return self.max_position_embeddings
