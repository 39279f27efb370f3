"""The shapes of the bench models: for each family its sizes, its `config.json`, its tensors and their spread.

A shape's fields are those of its `config.json` under the same names. Weights have a mean of 0 and a small deviation.
The exceptions, by the end of a tensor's name, have two purposes: nothing is so small that its absence would go
unnoticed, and a prompt's tokens spread over the experts. No torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

STD = 0.02

Size = tuple[int, ...]
Spread = tuple[float, float]  # mean and deviation


class Shape(ABC):
    """A family and its sizes; the base of one dataclass per family."""

    spreads: ClassVar[dict[str, Spread]] = {}  # of the family, by the end of a tensor's name

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """What the family's `config.json` has beside the fields and what all families have."""

    @abstractmethod
    def layer(self, index: int) -> Iterator[tuple[str, Size]]:
        """Name, without `model.layers.N.`, and size of every tensor of a layer."""

    def config(self) -> dict[str, object]:
        """The contents of `config.json`."""
        return vars(self) | COMMON | self.settings()

    def tensors(self) -> Iterator[tuple[str, Size]]:
        """Name and size of every tensor of the checkpoint."""
        yield "model.embed_tokens.weight", (self.vocab_size, self.hidden_size)
        for index in range(self.num_hidden_layers):
            for name, size in self.layer(index):
                yield f"model.layers.{index}.{name}", size
        yield "model.norm.weight", (self.hidden_size,)
        yield "lm_head.weight", (self.vocab_size, self.hidden_size)

    def spread(self, name: str) -> Spread:
        """Mean and deviation of a tensor's values."""
        every = SPREADS | self.spreads
        return next((every[end] for end in every if name.endswith(end)), (0.0, STD))

    def recipe(self) -> dict[str, object]:
        """All that the weights follow from, but for the seed."""
        return {"family": self.config()["model_type"], **vars(self), "std": STD, "spreads": SPREADS | self.spreads}


SPREADS = {
    "norm.weight": (1.0, 0.1),  # a missing norm is noticed
    "embed_tokens.weight": (0.0, 0.3),  # about what attention adds, so that a prompt's tokens spread over the experts
    "lm_head.weight": (0.0, 0.1),  # logits spread as in a trained model (deviation about 3), so errors are visible
}
COMMON = {
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_act": "silu",
    "initializer_range": STD,
    "tie_word_embeddings": False,
}


def _gated(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, Size]]:
    """A gated block: an expert, a shared expert, or the whole of a dense layer."""
    for name, size in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
        yield f"{prefix}.{name}.weight", size


@dataclass(frozen=True)
class Qwen3Moe(Shape):
    """`qwen3_moe`: grouped attention with norms on queries and keys, a softmax gate, every layer sparse."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    vocab_size: int
    norm_topk_prob: bool = True

    def settings(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "max_position_embeddings": 4096,
            "mlp_only_layers": [],
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "use_sliding_window": False,
        }

    def layer(self, index: int) -> Iterator[tuple[str, Size]]:
        hidden, d = self.hidden_size, self.head_dim
        queries, keys = self.num_attention_heads * d, self.num_key_value_heads * d
        yield "input_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"self_attn.{name}.weight", (rows, hidden)
        yield "self_attn.o_proj.weight", (hidden, queries)
        yield "self_attn.q_norm.weight", (d,)
        yield "self_attn.k_norm.weight", (d,)
        yield "post_attention_layernorm.weight", (hidden,)
        yield "mlp.gate.weight", (self.num_experts, hidden)
        for expert in range(self.num_experts):
            yield from _gated(f"mlp.experts.{expert}", hidden, self.moe_intermediate_size)


@dataclass(frozen=True)
class DeepseekV3(Shape):
    """`deepseek_v3`: latent attention, a sigmoid gate with a correction bias, shared experts, first layers dense."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    intermediate_size: int
    vocab_size: int

    spreads: ClassVar[dict[str, Spread]] = {
        "q_b_proj.weight": (0.0, 0.1),  # scores of a deviation above 1, half of it from rotated dims
        "e_score_correction_bias": (0.0, 0.05),  # a third of the scores' own deviation
        "down_proj.weight": (0.0, 0.006),  # routed experts count 2.5 times: a choice that rounding flips changes little
    }

    def settings(self) -> dict[str, object]:
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "attention_bias": False,
            "max_position_embeddings": 4096,
            "n_group": 1,
            "norm_topk_prob": True,
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": 0,
            "rms_norm_eps": 1e-6,
            "rope_interleave": True,
            "rope_theta": 10_000.0,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": 1,
            "topk_method": "noaux_tc",
        }

    def layer(self, index: int) -> Iterator[tuple[str, Size]]:
        hidden, heads, latent = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        yield "input_layernorm.weight", (hidden,)
        yield "self_attn.q_a_proj.weight", (self.q_lora_rank, hidden)
        yield "self_attn.q_a_layernorm.weight", (self.q_lora_rank,)
        key = self.qk_nope_head_dim + self.qk_rope_head_dim
        yield "self_attn.q_b_proj.weight", (heads * key, self.q_lora_rank)
        yield "self_attn.kv_a_proj_with_mqa.weight", (latent + self.qk_rope_head_dim, hidden)
        yield "self_attn.kv_a_layernorm.weight", (latent,)
        yield "self_attn.kv_b_proj.weight", (heads * (self.qk_nope_head_dim + self.v_head_dim), latent)
        yield "self_attn.o_proj.weight", (hidden, heads * self.v_head_dim)
        yield "post_attention_layernorm.weight", (hidden,)
        if index < self.first_k_dense_replace:
            yield from _gated("mlp", hidden, self.intermediate_size)
            return
        yield "mlp.gate.weight", (self.n_routed_experts, hidden)
        yield "mlp.gate.e_score_correction_bias", (self.n_routed_experts,)
        for expert in range(self.n_routed_experts):
            yield from _gated(f"mlp.experts.{expert}", hidden, self.moe_intermediate_size)
        shared = self.n_shared_experts * self.moe_intermediate_size
        yield from _gated("mlp.shared_experts", hidden, shared)


@dataclass(frozen=True)
class GptOss(Shape):
    """`gpt_oss`: attention with sinks and biases and a window in every other layer, experts with biases.

    YaRN's correction range is truncated, which is not so in gpt-oss: llama.cpp always truncates it.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int
    num_local_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    vocab_size: int

    spreads: ClassVar[dict[str, Spread]] = {
        "q_proj.weight": (0.0, 0.05),  # scores of a deviation above 1
        "sinks": (1.0, 1.0),
        "experts.gate_up_proj": (0.0, 0.08),  # some values are above the limit of the clamped SwiGLU
        "experts.down_proj": (0.0, 0.0006),  # values are large before it: a choice that rounding flips changes little
        "down_proj_bias": (0.0, 0.02),
        "bias": (0.0, 0.1),
    }

    def settings(self) -> dict[str, object]:
        layers = range(self.num_hidden_layers)
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "attention_bias": True,
            "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in layers],
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,
                "original_max_position_embeddings": 4096,
            },
            "rope_theta": 150_000.0,
            "swiglu_limit": 7.0,
        }

    def layer(self, index: int) -> Iterator[tuple[str, Size]]:
        hidden, inner, experts = self.hidden_size, self.intermediate_size, self.num_local_experts
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield "input_layernorm.weight", (hidden,)
        for name, rows, columns in (
            ("q_proj", queries, hidden),
            ("k_proj", keys, hidden),
            ("v_proj", keys, hidden),
            ("o_proj", hidden, queries),
        ):
            yield f"self_attn.{name}.weight", (rows, columns)
            yield f"self_attn.{name}.bias", (rows,)
        yield "self_attn.sinks", (self.num_attention_heads,)
        yield "post_attention_layernorm.weight", (hidden,)
        yield "mlp.router.weight", (experts, hidden)
        yield "mlp.router.bias", (experts,)
        yield "mlp.experts.gate_up_proj", (experts, hidden, 2 * inner)
        yield "mlp.experts.gate_up_proj_bias", (experts, 2 * inner)
        yield "mlp.experts.down_proj", (experts, inner, hidden)
        yield "mlp.experts.down_proj_bias", (experts, hidden)
