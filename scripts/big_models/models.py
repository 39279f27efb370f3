"""Published models as GGUF files: which tensors there are, in which types, and how their random values spread."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import torch
from bench_model.gguf_families import FAMILIES, Family
from bench_model.gguf_file import stays_float32
from bench_model.shapes import GptOss, Qwen3Moe, Shape, Size, Spread
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

PUBLISHED = Path(__file__).parents[2] / "tests" / "models" / "published_configs.json"
SHAPES: dict[str, type[Shape]] = {"qwen3_moe": Qwen3Moe, "gpt_oss": GptOss}
STD = 0.02
# Mean and deviation by the end of a tensor's name after a full stop. Logits spread as in a trained model. Attention
# averages over tokens, so what it adds must stay small beside the embedding: else, after some layers, all tokens of a
# prompt choose the same experts. What an expert adds is small too, so that a choice that rounding flips changes little.
SPREADS: dict[str, Spread] = {
    ".token_embd.weight": (0.0, 1.0),
    ".output.weight": (0.0, 0.07),
    ".attn_output.weight": (0.0, 0.0005),
    ".ffn_down_exps.weight": (0.0, 0.004),
    "norm.weight": (1.0, 0.1),
    "sinks.weight": (1.0, 1.0),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: type, shape with the contiguous dimension last, mean and deviation of its values."""

    name: str
    kind: Kind
    size: Size
    spread: Spread

    @property
    def num_rows(self) -> int:
        return math.prod(self.size[:-1])

    @property
    def row_bytes(self) -> int:
        weights, nbytes = gguf.GGML_QUANT_SIZES[self.kind]
        return self.size[-1] // weights * nbytes

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True)
class BigModel:
    """A published shape.

    Attributes:
        name: of the file.
        config: its `config.json`.
        experts, matrices: types of the experts' matrices and of the others. The embedding is BF16; vectors and gates
            are F32, as llama.cpp needs them.
        file_type: what llama.cpp calls a file of these types.
    """

    name: str
    config: Mapping[str, Any]
    experts: Kind
    matrices: Kind
    file_type: str

    @property
    def family(self) -> Family:
        """How llama.cpp names its parameters and tensors."""
        return FAMILIES[self.config["model_type"]]

    @cached_property
    def tensors(self) -> list[StoredTensor]:
        """All tensors, in the file's order."""
        return [self._stored(name, size) for name, size in self._sizes()]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def _sizes(self) -> Iterator[tuple[str, Size]]:
        config = self.config
        kind = SHAPES[config["model_type"]]
        shape = kind(**{field.name: config[field.name] for field in fields(kind)})  # type: ignore[arg-type]
        table = (config["vocab_size"], config["hidden_size"])
        yield "token_embd.weight", table
        yield "output_norm.weight", table[1:]
        yield "output.weight", table
        for layer in range(config["num_hidden_layers"]):
            sizes = dict(shape.layer(layer))

            def read(name: str, sizes: dict[str, Size] = sizes) -> Tensor:
                return torch.empty(sizes[name], device="meta")  # the family arranges shapes, without any weights

            for name, tensor in self.family.tensors(config, layer, read):
                yield f"blk.{layer}.{name}", tuple(tensor.shape)

    def _stored(self, name: str, size: Size) -> StoredTensor:
        if stays_float32(name, len(size)):
            kind = Kind.F32
        elif name == "token_embd.weight":
            kind = Kind.BF16
        else:
            kind = self.experts if "_exps." in name else self.matrices
        spread = next((SPREADS[end] for end in SPREADS if f".{name}".endswith(end)), (0.0, STD))
        return StoredTensor(name, kind, size, spread)


def big_models(tiny: bool = False) -> dict[str, BigModel]:
    """The models by name; `tiny` ones have the same types, two small layers and few experts."""
    published = json.loads(PUBLISHED.read_text())
    gpt_oss, qwen3 = published["openai/gpt-oss-20b"], published["Qwen/Qwen3-30B-A3B"]
    end = ""
    if tiny:
        end = "-tiny"
        small = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        small |= {"head_dim": 32, "num_experts_per_tok": 2, "vocab_size": 512}
        layers = gpt_oss["layer_types"][:2]
        gpt_oss |= small | {"num_local_experts": 8, "intermediate_size": 96, "layer_types": layers}
        qwen3 |= small | {"num_experts": 8, "moe_intermediate_size": 96}
    return {
        "gpt-oss-20b": BigModel(f"gpt-oss-20b{end}", gpt_oss, Kind.MXFP4, Kind.BF16, "mxfp4_moe"),
        "qwen3-30b-a3b": BigModel(f"qwen3-30b-a3b{end}", qwen3, Kind.Q4_0, Kind.Q4_0, "q4_0"),
    }
