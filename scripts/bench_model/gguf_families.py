"""How llama.cpp names a family's parameters and tensors, and where it arranges weights in another way.

Names and layouts are those that its architectures `qwen3moe`, `glm4moe`, `deepseek2` and `gpt-oss` read. The bits of
the weights stay the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import gguf
import torch
from torch import Tensor

Config = Mapping[str, Any]
Read = Callable[[str], Tensor]  # a tensor of one layer, by its name without the layer's prefix
PARTS = ("gate", "up", "down")
GROUPED_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}


class Family(ABC):
    """One family; tensors are named without `blk.N.`.

    Attributes:
        arch: llama.cpp's name of the family.
        names: its names of tensors that are stored as they are, and ours. A bias goes with its weight's name.
    """

    arch: ClassVar[str]
    names: ClassVar[dict[str, str]]

    @abstractmethod
    def describe(self, writer: gguf.GGUFWriter, config: Config) -> None:
        """Write the parameters that not all families have."""

    @abstractmethod
    def tensors(self, config: Config, layer: int, read: Read) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a layer."""

    def _named(self, read: Read, *left_out: str) -> Iterator[tuple[str, Tensor]]:
        for theirs, ours in self.names.items():
            if theirs not in left_out:
                yield theirs, read(ours)


class Qwen3Moe(Family):
    arch = "qwen3moe"
    names: ClassVar = GROUPED_ATTENTION | {
        "attn_q_norm.weight": "self_attn.q_norm.weight",
        "attn_k_norm.weight": "self_attn.k_norm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate_inp.weight": "mlp.gate.weight",
    }

    def describe(self, writer: gguf.GGUFWriter, config: Config) -> None:
        _describe_grouped_attention(writer, config)
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_count(config["num_experts"])

    def tensors(self, config: Config, layer: int, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield from self._named(read)
        yield from _stacked_experts(read, config["num_experts"])


class Glm4Moe(Family):
    """Without biases and norms of queries and keys, as in the demo model."""

    arch = "glm4moe"
    names: ClassVar = GROUPED_ATTENTION | {
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate_inp.weight": "mlp.gate.weight",
        "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    }

    def describe(self, writer: gguf.GGUFWriter, config: Config) -> None:
        assert config["first_k_dense_replace"] == 0
        _describe_grouped_attention(writer, config)
        writer.add_rope_dimension_count(int(config["head_dim"] * config["partial_rotary_factor"]))
        writer.add_leading_dense_block_count(0)
        _describe_sigmoid_gate(writer, config)

    def tensors(self, config: Config, layer: int, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield from self._named(read)
        yield from _stacked_experts(read, config["n_routed_experts"])
        yield from _shared_expert(read)


class DeepseekV3(Family):
    """Latent attention is one head of keys for all queries; a key is the latent and the shared rotated part."""

    arch = "deepseek2"
    names: ClassVar = {
        "attn_norm.weight": "input_layernorm.weight",
        "attn_q_a.weight": "self_attn.q_a_proj.weight",
        "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
        "attn_q_b.weight": "self_attn.q_b_proj.weight",
        "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
    }
    sparse_names: ClassVar = {
        "ffn_gate_inp.weight": "mlp.gate.weight",
        "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    }

    def describe(self, writer: gguf.GGUFWriter, config: Config) -> None:
        latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_head_count_kv(1)
        writer.add_q_lora_rank(config["q_lora_rank"])
        writer.add_kv_lora_rank(latent)
        writer.add_key_length(latent + rope)
        writer.add_value_length(latent)
        writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
        writer.add_value_length_mla(config["v_head_dim"])
        writer.add_rope_dimension_count(rope)
        _describe_sigmoid_gate(writer, config)

    def tensors(self, config: Config, layer: int, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield from self._named(read)
        # A head's key matrix is applied to queries, so it is stored the other way round.
        nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
        both = read("self_attn.kv_b_proj.weight").view(config["num_attention_heads"], nope + value, -1)
        yield "attn_k_b.weight", both[:, :nope].transpose(1, 2)
        yield "attn_v_b.weight", both[:, nope:]
        if layer < config["first_k_dense_replace"]:
            for part in PARTS:
                yield f"ffn_{part}.weight", read(f"mlp.{part}_proj.weight")
            return
        for theirs, ours in self.sparse_names.items():
            yield theirs, read(ours)
        yield from _stacked_experts(read, config["n_routed_experts"])
        yield from _shared_expert(read)


class GptOss(Family):
    """The checkpoint's experts are transposed, with gates and ups in turn; here they are separate rows."""

    arch = "gpt-oss"
    names: ClassVar = {
        "attn_norm.weight": "input_layernorm.weight",
        "attn_q.weight": "self_attn.q_proj.weight",
        "attn_q.bias": "self_attn.q_proj.bias",
        "attn_k.weight": "self_attn.k_proj.weight",
        "attn_k.bias": "self_attn.k_proj.bias",
        "attn_v.weight": "self_attn.v_proj.weight",
        "attn_v.bias": "self_attn.v_proj.bias",
        "attn_output.weight": "self_attn.o_proj.weight",
        "attn_output.bias": "self_attn.o_proj.bias",
        "attn_sinks.weight": "self_attn.sinks",
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate_inp.weight": "mlp.router.weight",
        "ffn_gate_inp.bias": "mlp.router.bias",
        "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
    }

    def describe(self, writer: gguf.GGUFWriter, config: Config) -> None:
        rope = config["rope_scaling"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_sliding_window(config["sliding_window"])
        _describe_grouped_attention(writer, config)
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_expert_count(config["num_local_experts"])

    def tensors(self, config: Config, layer: int, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield from self._named(read)
        gate_up, bias = read("mlp.experts.gate_up_proj"), read("mlp.experts.gate_up_proj_bias")
        for first, part in enumerate(("gate", "up")):
            yield f"ffn_{part}_exps.weight", gate_up[:, :, first::2].transpose(1, 2)
            yield f"ffn_{part}_exps.bias", bias[:, first::2]
        yield "ffn_down_exps.weight", read("mlp.experts.down_proj").transpose(1, 2)


FAMILIES: dict[str, Family] = {
    "qwen3_moe": Qwen3Moe(),
    "glm4_moe": Glm4Moe(),
    "deepseek_v3": DeepseekV3(),
    "gpt_oss": GptOss(),
}


def _describe_grouped_attention(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])


def _describe_sigmoid_gate(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(float(config["routed_scaling_factor"]))
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _stacked_experts(read: Read, experts: int) -> Iterator[tuple[str, Tensor]]:
    for part in PARTS:
        stored = [read(f"mlp.experts.{expert}.{part}_proj.weight") for expert in range(experts)]
        yield f"ffn_{part}_exps.weight", torch.stack(stored)


def _shared_expert(read: Read) -> Iterator[tuple[str, Tensor]]:
    for part in PARTS:
        yield f"ffn_{part}_shexp.weight", read(f"mlp.shared_experts.{part}_proj.weight")
