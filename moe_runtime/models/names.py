"""Names of tensors in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SwiGLUNames:
    """Names of a SwiGLU's three matrices, below its own prefix."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class TensorNames:
    """Tensor names in the checkpoints of a family. The defaults fit most families.

    Attributes:
        layer: prefix of a layer; `{}` is its index. The names that follow are below this prefix.
        attention_norm, mlp_norm: before the attention, before the MLP.
        query, key, value, attention_output: projections; each has a `.weight` and perhaps a `.bias`.
        query_norm, key_norm: of the heads.
        dense: prefix of a dense MLP.
        dense_parts: its matrices.
        sparse: prefix of a sparse block. A checkpoint may use `dense` instead.
        gate, correction_bias: below `sparse`.
        shared: prefix of the shared experts, below `sparse`; matrices as `dense_parts`.
        expert: prefix of one expert, below `sparse`; `{}` is its number.
        expert_parts: its matrices.
        fused_gate_up, fused_down: all experts of a layer, `[E, 2F, D]` and `[E, D, F]`, below the layer. They replace
            the single experts.
    """

    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    layer: str = "model.layers.{}"
    attention_norm: str = "input_layernorm.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm.weight"
    key_norm: str = "self_attn.k_norm.weight"
    dense: str = "mlp"
    dense_parts: SwiGLUNames = field(default_factory=SwiGLUNames)
    sparse: str = "mlp"
    gate: str = "gate.weight"
    correction_bias: str = "gate.e_score_correction_bias"
    shared: str = "shared_experts"
    expert: str = "experts.{}"
    expert_parts: SwiGLUNames = field(default_factory=SwiGLUNames)
    fused_gate_up: str = "mlp.experts.gate_up_proj"
    fused_down: str = "mlp.experts.down_proj"
