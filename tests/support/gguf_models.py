"""Writes a checkpoint's GGUF file as llama.cpp's converter does, with the names of tensors of the `gguf` package."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import k_quants
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType
from safetensors.torch import load_file
from torch import Tensor

Config = dict[str, Any]
KindOf = Callable[[str], Kind]
ARCHITECTURES = {
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "granitemoe": gguf.MODEL_ARCH.GRANITE_MOE,
    "granitemoeshared": gguf.MODEL_ARCH.GRANITE_MOE,
    "dots1": gguf.MODEL_ARCH.DOTS1,
    "ernie4_5_moe": gguf.MODEL_ARCH.ERNIE4_5_MOE,
    "hunyuan_v1_moe": gguf.MODEL_ARCH.HUNYUAN_MOE,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "glm4_moe_lite": gguf.MODEL_ARCH.DEEPSEEK2,
}
PERMUTED = ("mixtral", "granitemoe", "granitemoeshared")
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
EXPERT = re.compile(r"model\.layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight")


def write_gguf(
    folder: Path,
    file: Path,
    kind_of: KindOf = lambda name: Kind.F32,
    add_tokenizer: Callable[[gguf.GGUFWriter], object] | None = None,
    **options: Any,
) -> Path:
    """The GGUF file of a checkpoint with one safetensors file.

    Args:
        kind_of: the type of a matrix, by its name in the file; vectors and gates are F32.
        add_tokenizer: writes one; None: there is only the end of sequence of the `config.json`.
        options: of `GGUFWriter`.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch], **options)
    describe(writer, config)
    if add_tokenizer:
        add_tokenizer(writer)
    else:
        writer.add_tokenizer_model("none")
        writer.add_eos_token_id(config["eos_token_id"])
    for name, tensor in _named(arch, config, load_file(folder / "model.safetensors")):
        is_plain = tensor.ndim == 1 or name.endswith(".bias") or "ffn_gate_inp" in name
        kind = Kind.F32 if is_plain else kind_of(name)
        quantize = k_quants.pack if kind in k_quants.K_QUANTS else gguf.quants.quantize
        data = quantize(tensor.float().contiguous().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    write(writer)
    return file


def read_bpe(folder: Path, special: Sequence[str]) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types, and merges of the BPE in a `tokenizer.json`."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return tokens, [3 if token in special else 1 for token in tokens], merges


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(arch: gguf.MODEL_ARCH, config: Config, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file."""
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if match := EXPERT.fullmatch(name):
            stacked = f"blk.{match[1]}.ffn_{PARTS[match[3]]}_exps.weight"
            experts.setdefault(stacked, {})[int(match[2])] = tensor
            continue
        for ours, part in _arranged(config, name, tensor):
            found = ours if ours.startswith("blk.") else names.get_name(ours, try_suffixes=(".weight", ".bias"))
            assert found is not None, ours
            yield found, part
    for name, tensors in experts.items():
        yield name, torch.stack([tensors[expert] for expert in range(len(tensors))])


def _arranged(config: Config, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor as llama.cpp has it, perhaps in parts; names are the checkpoint's, or begin with `blk`."""
    family, layer = config["model_type"], next(iter(re.findall(r"layers\.(\d+)\.", name)), "")
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    if family in PERMUTED and re.search(r"\.[qk]_proj\.", name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if family in LATENT and "kv_b_proj" in name:
        nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
        both = tensor.view(config["num_attention_heads"], nope + value, -1)
        yield f"blk.{layer}.attn_k_b.weight", both[:, :nope].transpose(1, 2)
        yield f"blk.{layer}.attn_v_b.weight", both[:, nope:]
    elif family == "gpt_oss" and "gate_up_proj" in name:
        turned = tensor.transpose(1, 2) if tensor.ndim == 3 else tensor
        for first, part in enumerate(("gate", "up")):
            yield f"blk.{layer}.ffn_{part}_exps.{'bias' if 'bias' in name else 'weight'}", turned[:, first::2]
    elif family == "gpt_oss" and "experts.down_proj" in name:
        kind, turned = ("bias", tensor) if "bias" in name else ("weight", tensor.transpose(1, 2))
        yield f"blk.{layer}.ffn_down_exps.{kind}", turned
    elif "input_linear" in name:
        end = "shexp" if "shared" in name else "exps"
        for part, rows in zip(("gate", "up"), tensor.chunk(2, dim=-2), strict=True):
            yield f"blk.{layer}.ffn_{part}_{end}.weight", rows
    elif family == "gpt_oss" and name.endswith("sinks"):
        yield f"{name}.weight", tensor
    else:
        yield name, tensor.flatten() if "moe_statics" in name or "shared_expert_gate" in name else tensor


def describe(writer: gguf.GGUFWriter, config: Config) -> None:
    """Write the metadata of a `config.json`."""
    family, get = config["model_type"], config.get
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    sizes = [
        config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") if get(key)
    ]
    writer.add_expert_count(sizes[0])
    chosen = [config[key] for key in ("num_experts_per_tok", "moe_topk", "moe_k") if get(key)]
    writer.add_expert_used_count(chosen[0])
    if get("n_group"):
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    _describe_rope(writer, config)
    (_describe_latent if family in LATENT else _describe_grouped)(writer, config)
    own = {
        "qwen2_moe": ("moe_intermediate_size", "shared_expert_intermediate_size"),
        "qwen3_moe": ("moe_intermediate_size",),
        "minimax_m2": ("intermediate_size",),
        "gpt_oss": ("intermediate_size",),
        "hunyuan_v1_moe": ("intermediate_size", "intermediate_size"),
        "ernie4_5_moe": ("moe_intermediate_size",),
    }
    for add, key in zip(
        (writer.add_expert_feed_forward_length, writer.add_expert_shared_feed_forward_length),
        own.get(family, ()),
        strict=False,
    ):
        add(config[key])
    if family in ("dots1", "glm4_moe", *LATENT):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(get("first_k_dense_replace", 1))
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        if family != "deepseek_v2":
            writer.add_expert_weights_norm(config["norm_topk_prob"])
            writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if family == "ernie4_5_moe":
        writer.add_expert_shared_count(config["moe_num_shared_experts"])
        writer.add_expert_shared_feed_forward_length(config["moe_num_shared_experts"] * config["moe_intermediate_size"])
        writer.add_leading_dense_block_count(config["moe_layer_start_index"])
        writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
    if family.startswith("granite"):
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
        if family == "granitemoeshared":
            writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
    if family == "hunyuan_v1_moe":
        writer.add_expert_shared_count(1)
    if family == "minimax_m2":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if family == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])


def _describe_rope(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
        if rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _describe_grouped(writer: gguf.GGUFWriter, config: Config) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rotated = config.get("rotary_dim") or int(head_dim * config["rope_parameters"].get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotated)


def _describe_latent(writer: gguf.GGUFWriter, config: Config) -> None:
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)


VALUE_TYPES = {
    str: GGUFValueType.STRING,
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    type(None): None,
}


def edited(
    file: Path,
    changes: dict[str, Any],
    drop: str | None = None,
    extra: str | None = None,
    *,
    dequantises: bool = False,
) -> Path:
    """A copy with other metadata, None removes a key; without one tensor, with one more, or all in float32."""
    reader = gguf.GGUFReader(file)
    path = file.with_name("edited.gguf")
    arch = changes.get("general.architecture", reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, arch)
    values = {field.name: (field.contents(), field.types[0]) for field in reader.fields.values()}
    values |= {key: (value, VALUE_TYPES[type(value)]) for key, value in changes.items()}
    for key, (value, kind) in values.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and value is not None:
            writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        if dequantises:
            writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        elif tensor.name != drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if extra:
        writer.add_tensor(extra, torch.ones(8).numpy())
    write(writer)
    return path
