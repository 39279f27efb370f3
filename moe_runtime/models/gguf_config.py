"""From the metadata of a GGUF file to the `config.json` that the family's own reader takes. No torch.

Keys and defaults are those of llama.cpp. What a file does not say follows from what llama.cpp computes, or else from
the family's published models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_runtime.models.gguf_metadata import Metadata
from moe_runtime.models.hf_config import shown
from moe_runtime.weights.gguf_file import Gguf

Config = dict[str, Any]
SOFTMAX, SIGMOID = 1, 2  # values of `expert_gating_func`
# Recommended sampling parameters, and their names in `generation_config.json`.
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
GLM_LITE = ((47, 48), 154880)  # block counts and vocabulary of GLM-4.7-Flash, whose first files named no gate


def read_config(gguf: Gguf) -> tuple[Config, bool]:
    """The `config.json` that a file's metadata means, and whether the file has the rows of queries and keys in
    rotary pairs, where the family's checkpoints have them in halves.

    Raises:
        ValueError: an unknown architecture, a missing or unsupported value.
    """
    arch = gguf.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"general.architecture: {shown(arch)} in {gguf.path} is not known; known: {known}")
    metadata, architecture = Metadata(gguf), ARCHITECTURES[arch]
    config = architecture.read(metadata)
    config = _common(metadata) | config
    metadata.finish()
    return config, architecture.has_pairs


def read_generation_config(gguf: Gguf) -> Config:
    """The `generation_config.json` that a file's metadata means."""
    return {ours: gguf.metadata.get(f"general.sampling.{theirs}") for theirs, ours in SAMPLING.items()}


def _common(metadata: Metadata) -> Config:
    """What all families have."""
    gguf = metadata.gguf
    tokens = [gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "vocab_size": metadata.vocab_size,
        "hidden_size": metadata.need("embedding_length"),
        "num_hidden_layers": metadata.integer("block_count") - metadata.integer("nextn_predict_layers", 0),
        "num_attention_heads": metadata.need("attention.head_count"),
        "max_position_embeddings": metadata.need("context_length"),
        "rms_norm_eps": metadata.need("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(metadata),
        "num_experts_per_tok": metadata.need("expert_used_count"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "eos_token_id": [token for token in tokens if token is not None],
        "torch_dtype": "float32" if _is_float32(gguf) else "bfloat16",
    }


def _is_float32(gguf: Gguf) -> bool:
    """Whether all matrices are float32. Gates always are; experts may be quantised."""
    return all(
        tensor.dtype == "F32"
        for name, (_, tensor) in gguf.tensors.items()
        if len(tensor.shape) == 2 and "ffn_gate_inp" not in name
    )


def _rope(metadata: Metadata) -> Config:
    factor = metadata.get("rope.scaling.factor") or metadata.get("rope.scale_linear") or 1.0
    kind = metadata.get("rope.scaling.type", "linear")
    original = metadata.get("rope.scaling.original_context_length", metadata.need("context_length"))
    metadata.always("rope.scaling.type", "none", "linear", "yarn")
    metadata.always("rope.scaling.attn_factor", 1.0)
    metadata.always("rope.scaling.yarn_ext_factor", 1.0)
    theta = {"rope_theta": metadata.get("rope.freq_base", 10_000.0)}
    if kind == "yarn":
        yarn = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": metadata.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": metadata.get("rope.scaling.yarn_beta_slow"),
            "attention_factor": metadata.get("rope.scaling.yarn_attn_factor"),
        }
        return theta | {key: value for key, value in yarn.items() if value is not None}
    if kind == "none" or factor == 1.0:
        return theta | {"rope_type": "default"}
    return theta | {"rope_type": "linear", "factor": factor}


def _grouped(metadata: Metadata, is_partial: bool = False) -> Config:
    """Grouped-query attention; heads are rotated whole unless `is_partial`.

    A family without biases refuses `attention_bias` if it is true.
    """
    heads = metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", metadata.integer("embedding_length") // max(1, heads))
    metadata.always("attention.value_length", head_dim)
    if not is_partial:
        metadata.always("rope.dimension_count", head_dim)
    return {
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "attention_bias": metadata.has("attn_q.bias") or metadata.has("attn_output.bias"),
    }


def _plain_gate(metadata: Metadata, scores: int = SOFTMAX) -> None:
    """Raise ValueError unless the gate has neither groups nor a factor."""
    metadata.always("expert_gating_func", scores)
    metadata.always("expert_group_count", 0, 1)
    metadata.always("expert_group_used_count", 0, 1)
    metadata.always("expert_weights_scale", 0.0, 1.0)


def _deepseek_experts(metadata: Metadata) -> Config:
    """The sparse block that DeepSeek-V2, V3 and their relatives have, but for the gate."""
    return {
        "n_routed_experts": metadata.need("expert_count"),
        "n_shared_experts": metadata.need("expert_shared_count"),
        "moe_intermediate_size": metadata.need("expert_feed_forward_length"),
        "intermediate_size": metadata.need("feed_forward_length"),
        "first_k_dense_replace": metadata.get("leading_dense_block_count", 0),
        "routed_scaling_factor": metadata.get("expert_weights_scale") or 1.0,
        "n_group": metadata.get("expert_group_count") or 1,
        "topk_group": metadata.get("expert_group_used_count") or 1,
    }


def _sigmoid_gate(metadata: Metadata) -> Config:
    """The sparse block of DeepSeek-V3 and its relatives."""
    metadata.always("expert_gating_func", SIGMOID)
    return _deepseek_experts(metadata) | {"norm_topk_prob": metadata.get("expert_weights_norm", False)}


def _qwen2_moe(metadata: Metadata) -> Config:
    _plain_gate(metadata)
    config = _grouped(metadata) | {
        "model_type": "qwen2_moe",
        "num_experts": metadata.need("expert_count"),
        "moe_intermediate_size": metadata.need("expert_feed_forward_length"),
        "shared_expert_intermediate_size": metadata.need("expert_shared_feed_forward_length"),
        "norm_topk_prob": metadata.get("expert_weights_norm", False),
    }
    config["qkv_bias"] = config.pop("attention_bias")
    return config


def _qwen3_moe(metadata: Metadata) -> Config:
    _plain_gate(metadata)
    return _grouped(metadata) | {
        "model_type": "qwen3_moe",
        "num_experts": metadata.need("expert_count"),
        "moe_intermediate_size": metadata.need("expert_feed_forward_length"),
        "norm_topk_prob": metadata.get("expert_weights_norm", True),
    }


def _olmoe(metadata: Metadata) -> Config:
    _plain_gate(metadata)
    return _grouped(metadata) | {
        "model_type": "olmoe",
        "num_experts": metadata.need("expert_count"),
        "intermediate_size": metadata.need("feed_forward_length"),
        "norm_topk_prob": metadata.get("expert_weights_norm", False),
    }


def _mixtral(metadata: Metadata) -> Config:
    _plain_gate(metadata)
    return _grouped(metadata) | {
        "model_type": "mixtral",
        "num_local_experts": metadata.need("expert_count"),
        "intermediate_size": metadata.need("feed_forward_length"),
    }


def _granite(metadata: Metadata) -> Config:
    grouped, shared = _grouped(metadata), metadata.get("expert_shared_feed_forward_length", 0)
    _plain_gate(metadata)
    metadata.always("rope.scaling.finetuned", True)  # false: without a rotary embedding
    return grouped | {
        "model_type": "granitemoeshared" if shared else "granitemoe",
        "num_local_experts": metadata.need("expert_count"),
        "intermediate_size": metadata.need("feed_forward_length"),
        "shared_intermediate_size": shared,
        "embedding_multiplier": metadata.get("embedding_scale") or 1.0,
        "attention_multiplier": metadata.get("attention.scale") or max(1, grouped["head_dim"]) ** -0.5,
        "residual_multiplier": metadata.get("residual_scale") or 1.0,
        "logits_scaling": metadata.need("logit_scale"),
    }


def _dots1(metadata: Metadata) -> Config:
    return _grouped(metadata) | _sigmoid_gate(metadata) | {"model_type": "dots1", "sliding_window": None}


def _ernie(metadata: Metadata) -> Config:
    _plain_gate(metadata)
    return _grouped(metadata) | {
        "model_type": "ernie4_5_moe",
        "moe_num_experts": metadata.need("expert_count"),
        "moe_intermediate_size": metadata.need("expert_feed_forward_length"),
        "moe_num_shared_experts": metadata.get("expert_shared_count", 0),
        "moe_layer_start_index": metadata.need("leading_dense_block_count"),
        "moe_layer_interval": metadata.need("interleave_moe_layer_step"),
        "intermediate_size": metadata.need("feed_forward_length"),
    }


def _hunyuan(metadata: Metadata) -> Config:
    _plain_gate(metadata)
    metadata.always("expert_shared_count", 1)
    return _grouped(metadata) | {
        "model_type": "hunyuan_v1_moe",
        "num_experts": metadata.need("expert_count"),
        "intermediate_size": metadata.need("feed_forward_length"),
        "moe_intermediate_size": metadata.need("expert_feed_forward_length"),
    }


def _minimax_m2(metadata: Metadata) -> Config:
    _plain_gate(metadata, SIGMOID)
    grouped = _grouped(metadata, is_partial=True)
    return grouped | {
        "model_type": "minimax_m2",
        "rotary_dim": metadata.get("rope.dimension_count", grouped["head_dim"]),
        "num_local_experts": metadata.need("expert_count"),
        "intermediate_size": metadata.need("expert_feed_forward_length"),
    }


def _glm4_moe(metadata: Metadata) -> Config:
    grouped = _grouped(metadata, is_partial=True)
    size = grouped["head_dim"]
    share = metadata.integer("rope.dimension_count", size) / max(1, size)
    return {
        **grouped,
        **_sigmoid_gate(metadata),
        "model_type": "glm4_moe",
        "rope_parameters": _rope(metadata) | {"partial_rotary_factor": share},
        "use_qk_norm": metadata.has("attn_q_norm.weight"),
    }


def _gpt_oss(metadata: Metadata) -> Config:
    """Files do not say whether YaRN's bounds are rounded to whole numbers. In the published models they are not."""
    _plain_gate(metadata)
    rope = _rope(metadata)
    return _grouped(metadata) | {
        "model_type": "gpt_oss",
        "rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
        "sliding_window": metadata.need("attention.sliding_window"),
        "num_local_experts": metadata.need("expert_count"),
        "intermediate_size": metadata.need("expert_feed_forward_length"),
    }


def _deepseek(metadata: Metadata) -> Config:
    """DeepSeek-V2 or V3 and their relatives; the gate tells which.

    `key_length` and `value_length` are those of a head in older files. In newer ones they are those of the one head
    that llama.cpp makes of all, and those of a head have names of their own.
    """
    own, rope_size = ("attention.key_length", "attention.value_length"), metadata.integer("rope.dimension_count")
    key, value = (metadata.integer(f"{name}_mla", metadata.integer(name)) for name in own)
    metadata.get("attention.head_count_kv")  # 1 in newer files
    rope = _rope(metadata)
    # A tenth of it is stored. llama.cpp knows no model in which the two differ.
    if magnitude := round(metadata.number("rope.scaling.yarn_log_multiplier", 0.0) * 10, 6):
        rope |= {"mscale": magnitude, "mscale_all_dim": magnitude}
    attention = {
        "rope_parameters": rope,
        "q_lora_rank": metadata.get("attention.q_lora_rank"),
        "kv_lora_rank": metadata.need("attention.kv_lora_rank"),
        "qk_nope_head_dim": key - rope_size,
        "qk_rope_head_dim": rope_size,
        "v_head_dim": value,
    }
    blocks, vocabulary = GLM_LITE
    is_glm = metadata.integer("block_count") in blocks and metadata.vocab_size == vocabulary
    gate = metadata.get("expert_gating_func") or (SIGMOID if is_glm else SOFTMAX)
    if gate != SOFTMAX:
        return attention | _sigmoid_gate(metadata) | {"model_type": "deepseek_v3"}
    metadata.always("expert_weights_norm", False)
    experts = _deepseek_experts(metadata)
    method = "greedy" if experts["n_group"] == 1 else "group_limited_greedy"
    return attention | experts | {"model_type": "deepseek_v2", "topk_method": method}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        read: the keys of its `config.json` that not all families have, or have otherwise.
        has_pairs: see `read_config`.
    """

    read: Callable[[Metadata], Config]
    has_pairs: bool = False


ARCHITECTURES = {
    "deepseek2": Architecture(_deepseek),
    "dots1": Architecture(_dots1),
    "ernie4_5-moe": Architecture(_ernie),
    "glm4moe": Architecture(_glm4_moe),
    "gpt-oss": Architecture(_gpt_oss),
    "granitemoe": Architecture(_granite, has_pairs=True),
    "hunyuan-moe": Architecture(_hunyuan),
    "llama": Architecture(_mixtral, has_pairs=True),
    "minimax-m2": Architecture(_minimax_m2),
    "olmoe": Architecture(_olmoe),
    "qwen2moe": Architecture(_qwen2_moe),
    "qwen3moe": Architecture(_qwen3_moe),
}
