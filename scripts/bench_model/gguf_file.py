"""The GGUF file of a model for llama.cpp, without a tokenizer: weights with the same bits, or quantised."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from bench_model.gguf_families import FAMILIES, Config


def write_gguf(config: Config, weights: Path, path: Path, kind: str = "bf16") -> None:
    """Write the model of a `config.json` and a safetensors file.

    Args:
        config: of a family in `FAMILIES`.
        kind: of the matrices in attention, experts and head: "bf16", "q8_0" or "q4_0". The embedding stays bf16. A head
            that is tied to it is written too, in this type.
    """
    family = FAMILIES[config["model_type"]]
    writer = gguf.GGUFWriter(path, family.arch)
    describe(writer, config, kind)
    family.describe(writer, config)
    with safe_open(weights, framework="pt") as source:
        _add(writer, "token_embd.weight", source.get_tensor("model.embed_tokens.weight"))
        _add(writer, "output_norm.weight", source.get_tensor("model.norm.weight"))
        head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        _add(writer, "output.weight", source.get_tensor(head), kind)
        layers = range(config["num_hidden_layers"])
        for layer in tqdm(layers, unit="layer", desc="reading weights for the GGUF file"):

            def read(name: str, prefix: str = f"model.layers.{layer}") -> Tensor:
                found: Tensor = source.get_tensor(f"{prefix}.{name}")
                return found

            for name, tensor in family.tensors(config, layer, read):
                _add(writer, f"blk.{layer}.{name}", tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=sys.stderr.isatty())
        writer.close()


def describe(writer: gguf.GGUFWriter, config: Config, kind: str) -> None:
    """Write the parameters that all families have; `kind` is the end of a name in `gguf.LlamaFileType`."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_tokenizer_model("none")


def stays_float32(name: str, num_dims: int) -> bool:
    """Whether llama.cpp needs a tensor in float32: norms, biases, sinks and gates."""
    return num_dims == 1 or name.endswith(".bias") or "ffn_gate_inp" in name


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: str = "bf16") -> None:
    if stays_float32(name, tensor.ndim):
        writer.add_tensor(name, tensor.float().numpy())  # exact
    elif kind != "bf16":
        stored = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), stored), raw_dtype=stored)
    else:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
