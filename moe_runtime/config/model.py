"""A checkpoint's configuration, with Hugging Face's different spellings normalised. No torch."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from moe_runtime.config.attention import AnyAttention, AttentionConfig, KVSpec, LatentAttentionConfig
from moe_runtime.types.weight_format import DENSE, BlockFormats, WeightFormat


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of `rotary_dim` of each head's dims. `kind` and its parameters are as in HF's configs.

    Attributes:
        interleaved: in the checkpoint, dimension 2i rotates with 2i + 1. The reader reorders the rows of the
            projections, so that i rotates with i + rotary_dim / 2, as the kernels have it.
        query_scale: beta and length: latent attention multiplies queries by
            1 + beta * log(1 + floor(position / length)). None: it does not.
    """

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
    interleaved: bool = False
    query_scale: tuple[float, int] | None = None


def yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's factor on cos and sin for a context of `factor` times the trained one (arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class MoEConfig:
    """The sparse block of a layer: experts, gate and shared experts.

    Attributes:
        groups_by_best: a group of experts counts by its best choice, else by the sum of its two best.
        gate_bias: the gate's product has a bias.
        expert_bias: the experts' projections have biases.
        swiglu_alpha, swiglu_limit, swiglu_offset: of the experts' activation; see `kernels.swiglu`.
        shared_gate: each token weighs the shared experts' output by the sigmoid of a product with its own row.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    gate_bias: bool = False
    expert_bias: bool = False
    swiglu_alpha: float = 1.0
    swiglu_limit: float = math.inf
    swiglu_offset: float = 0.0
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize_topk: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    groups_by_best: bool = False
    correction_bias: bool = False
    gate_float32: bool = False


@dataclass(frozen=True)
class LayerFormats:
    """How the matrices of a layer are held; None: in the model's dtype. Gates are never quantised.

    Attributes:
        attention: projections; of latent attention not those from the latent, whose heads are held apart.
        mlp: the dense MLP, or the shared experts.
        experts: routed experts.
    """

    attention: BlockFormats = DENSE
    mlp: BlockFormats = DENSE
    experts: BlockFormats = DENSE

    @property
    def all(self) -> tuple[WeightFormat | None, ...]:
        """Those of all parts."""
        return *self.attention.all, *self.mlp.all, *self.experts.all


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer: its attention, and the intermediate size of its dense MLP; None for a sparse layer.

    One of the kinds of attention is given. They are fields apart because a message can't carry a choice of dataclasses.
    """

    grouped: AttentionConfig | None
    latent: LatentAttentionConfig | None
    dense_intermediate_size: int | None
    formats: LayerFormats = LayerFormats()

    @classmethod
    def of(cls, attention: AnyAttention, dense_intermediate_size: int | None) -> LayerConfig:
        """A layer with either kind of attention."""
        if isinstance(attention, LatentAttentionConfig):
            return cls(None, attention, dense_intermediate_size)
        return cls(attention, None, dense_intermediate_size)

    @property
    def attention(self) -> AnyAttention:
        """The attention, of whichever kind."""
        found = self.grouped or self.latent
        assert found is not None
        return found

    @property
    def is_sparse(self) -> bool:
        return self.dense_intermediate_size is None


def layers_alike(
    num_layers: int,
    attention: AnyAttention,
    sparse: Container[int],
    dense_intermediate_size: int,
    windows: Sequence[int | None] | None = None,
) -> tuple[LayerConfig, ...]:
    """Layers with the same attention; those whose index is not in `sparse` have a dense MLP.

    Args:
        windows: each layer's sliding window; None: all layers have that of `attention`.
    """
    attentions = [attention] * num_layers
    if windows is not None:
        assert isinstance(attention, AttentionConfig)
        attentions = [replace(attention, sliding_window=window) for window in windows]
    sizes = [None if index in sparse else dense_intermediate_size for index in range(num_layers)]
    return tuple(map(LayerConfig.of, attentions, sizes))


@dataclass(frozen=True)
class ModelConfig:
    """One checkpoint's configuration, with Hugging Face's different spellings normalised.

    Attributes:
        eos_token_ids: tokens that end an output.
        embedding_multiplier: factor on the embedding's rows.
        residual_multiplier: factor on each block's output, before it is added to the residual rows.
        logits_scaling: the head's rows are divided by it.
        default_sampling: fields of `SamplingParams` for requests that leave them out.
        head_format: how the head is held; None: in the model's dtype. A head that is quantised shares nothing with the
            embedding, which never is.
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
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    default_sampling: Mapping[str, float | int] = field(default_factory=dict, hash=False)
    head_format: WeightFormat | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def formats(self) -> dict[str, str]:
        """The quantised formats of each part, by name; "none" where a part is in the model's dtype."""
        held: dict[str, list[WeightFormat | None]] = {
            "experts": [each for layer in self.layers if layer.is_sparse for each in layer.formats.experts.all],
            "mlp": [each for layer in self.layers if self._has_mlp(layer) for each in layer.formats.mlp.all],
            "attention": [each for layer in self.layers for each in layer.formats.attention.all],
            "head": [self.head_format],
        }
        return {
            part: ", ".join(dict.fromkeys("none" if format is None else format.name for format in found))
            for part, found in held.items()
            if found
        }

    def _has_mlp(self, layer: LayerConfig) -> bool:
        """Whether a layer has a dense MLP or shared experts."""
        return not layer.is_sparse or self.moe.shared_intermediate_size > 0

    @property
    def shares_embedding(self) -> bool:
        """Whether the head and the embedding are one matrix in memory."""
        return self.tie_word_embeddings and self.head_format is None

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the sparse layers."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.is_sparse)

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The layers' different sliding windows, None for none. Layers with the same one form a page group: a sequence
        keeps the same tokens in all of them, in pages of the same numbers."""
        return tuple(dict.fromkeys(layer.attention.sliding_window for layer in self.layers))

    @cached_property
    def page_groups(self) -> tuple[int, ...]:
        """The page group of each layer, an index into `windows`."""
        return tuple(self.windows.index(layer.attention.sliding_window) for layer in self.layers)

    def kv_specs(self, dtype: str) -> list[KVSpec]:
        """The state that each layer keeps for a token, in a dtype of `attention.KV_ITEMSIZE`."""
        return [layer.attention.kv_spec(dtype) for layer in self.layers]

    @property
    def max_model_len(self) -> int:
        """Maximum context: the trained one, times the rope factor if the scaling is meant to extend the context."""
        if self.rope.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.kind == "yarn":
            return int(self.rope.original_max_position * self.rope.factor)
        return self.max_position_embeddings
