"""What a checkpoint is, Hugging Face's many spellings normalised once. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `rotary_dim` of each head's dims are rotated; `kind` and its figures as in HF's configs."""

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
class ModelConfig:
    """One checkpoint, Hugging Face's many spellings normalised once. `moe_layers` are the sparse layers' indices."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    moe: MoEConfig
    moe_layers: tuple[int, ...]
    sliding_window: int | None
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def max_model_len(self) -> int:
        """Longest context: the trained one times the rope factor where the scaling is meant to reach beyond it."""
        if self.rope.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.kind == "yarn":
            return int(self.rope.original_max_position * self.rope.factor)
        return self.max_position_embeddings
