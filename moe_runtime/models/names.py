"""Names of tensors in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_runtime.config.attention import AnyAttention, LatentAttentionConfig


@dataclass(frozen=True)
class SwiGLUNames:
    """Names of a SwiGLU's three matrices, below its own prefix.

    Attributes:
        gate_up: gate and up in one matrix `[2F, D]`, gate first; it replaces `gate` and `up`. Empty: there is none.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = ""

    @property
    def up_matrices(self) -> tuple[str, ...]:
        """The matrices before the activation."""
        return (self.gate_up,) if self.gate_up else (self.gate, self.up)


@dataclass(frozen=True)
class LatentNames:
    """Names of latent attention's tensors, below the layer; projections have a `.weight` and perhaps a `.bias`.

    Attributes:
        query_down, query_norm, query_up: of compressed queries.
        latent_down: to the latent and the shared key.
        latent_norm: of the latent.
        latent_up: from the latent to each head's key and value, `[H * (n + v), L]`.
    """

    query_down: str = "self_attn.q_a_proj"
    query_norm: str = "self_attn.q_a_layernorm.weight"
    query_up: str = "self_attn.q_b_proj"
    latent_down: str = "self_attn.kv_a_proj_with_mqa"
    latent_norm: str = "self_attn.kv_a_layernorm.weight"
    latent_up: str = "self_attn.kv_b_proj"


@dataclass(frozen=True)
class TensorNames:
    """Tensor names in the checkpoints of a family. The defaults fit most families.

    Attributes:
        layer: prefix of a layer; `{}` is its index. The names that follow are below this prefix.
        attention_norm, mlp_norm: before the attention, before the MLP.
        query, key, value, attention_output: projections; each has a `.weight` and perhaps a `.bias`.
        query_norm, key_norm: of the heads.
        latent: of latent attention, beside `query` and `attention_output`.
        dense: prefix of a dense MLP.
        dense_parts: its matrices.
        sparse: prefix of a sparse block. A checkpoint may use `dense` instead.
        sinks: of a layer with sinks.
        gate, gate_bias, correction_bias: below `sparse`.
        correction_bias_is_row: it is stored as `[1, E]`.
        shared: prefix of the shared experts.
        shared_parts: their matrices.
        shared_gate: `[1, D]`, if tokens weigh the shared experts.
        expert: prefix of one expert, below `sparse`; `{}` is its number.
        expert_parts: its matrices.
        fused_gate_up, fused_down: all experts of a layer, `[E, 2F, D]` and `[E, D, F]`, if the family has names of its
            own for them. They replace the single experts.
        fused_is_transposed: they are `[E, D, 2F]` and `[E, F, D]`.
        fused_is_interleaved: gate and up alternate, else all of the gate comes first.
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
    sinks: str = ""
    latent: LatentNames = field(default_factory=LatentNames)
    dense: str = "mlp"
    dense_parts: SwiGLUNames = field(default_factory=SwiGLUNames)
    sparse: str = "mlp"
    gate: str = "gate.weight"
    gate_bias: str = ""
    correction_bias: str = "gate.e_score_correction_bias"
    correction_bias_is_row: bool = False
    shared: str = "mlp.shared_experts"
    shared_parts: SwiGLUNames = field(default_factory=SwiGLUNames)
    shared_gate: str = ""
    expert: str = "experts.{}"
    expert_parts: SwiGLUNames = field(default_factory=SwiGLUNames)
    fused_gate_up: str = ""
    fused_down: str = ""
    fused_is_transposed: bool = False
    fused_is_interleaved: bool = False

    def projections(self, attention: AnyAttention, hidden_size: int) -> list[tuple[str, int, int]]:
        """Names, outputs and inputs of the projections of a layer, but for those from the latent."""
        if not isinstance(attention, LatentAttentionConfig):
            return [
                (self.query, attention.query_size, hidden_size),
                (self.key, attention.kv_size, hidden_size),
                (self.value, attention.kv_size, hidden_size),
                (self.attention_output, hidden_size, attention.query_size),
            ]
        rank, latent = attention.query_rank, self.latent
        queries = [(self.query, attention.query_size, hidden_size)]
        if rank is not None:
            queries = [(latent.query_down, rank, hidden_size), (latent.query_up, attention.query_size, rank)]
        return [
            *queries,
            (latent.latent_down, attention.key_size, hidden_size),
            (self.attention_output, hidden_size, attention.output_size),
        ]
