"""Reads the dense llama-architecture model that the demo is carved from: sizes, float32 weights, tokenizer.

Shapes: D hidden, F FFN neurons, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class DenseSizes:
    """Sizes and constants of the dense model, from the GGUF metadata."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rms_norm_eps: float


class DenseModel:
    """A GGUF file opened for reading (memory-mapped). Weights are dequantised when they are read."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(self, name: str) -> Any:
        """Value of one metadata field, for example `tokenizer.ggml.tokens`."""
        return self._fields[name].contents()

    @cached_property
    def sizes(self) -> DenseSizes:
        return DenseSizes(
            num_layers=self.field("llama.block_count"),
            hidden_size=self.field("llama.embedding_length"),
            ffn_size=self.field("llama.feed_forward_length"),
            num_heads=self.field("llama.attention.head_count"),
            num_kv_heads=self.field("llama.attention.head_count_kv"),
            vocab_size=self.field("llama.vocab_size"),
            context_length=self.field("llama.context_length"),
            rope_theta=self.field("llama.rope.freq_base"),
            # Stored as a float32; the checkpoint should say 1e-05, not 9.999999747378752e-06.
            rms_norm_eps=float(f"{self.field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        )

    def embedding(self) -> FloatArray:
        """Token embedding (V, D), which is also the output head."""
        return self._weight("token_embd")

    def final_norm(self) -> FloatArray:
        """Weight of the last RMSNorm (D,)."""
        return self._weight("output_norm")

    def layer(self, index: int) -> dict[str, FloatArray]:
        """Attention and norm weights of one layer under HF llama's names, without the `model.layers.N.` prefix."""
        weight = {name: self._weight(f"blk.{index}.{name}") for name in ("attn_v", "attn_output")}
        return {
            "input_layernorm.weight": self._weight(f"blk.{index}.attn_norm"),
            "post_attention_layernorm.weight": self._weight(f"blk.{index}.ffn_norm"),
            "self_attn.q_proj.weight": _half_split(self._weight(f"blk.{index}.attn_q"), self.sizes.num_heads),
            "self_attn.k_proj.weight": _half_split(self._weight(f"blk.{index}.attn_k"), self.sizes.num_kv_heads),
            "self_attn.v_proj.weight": weight["attn_v"],
            "self_attn.o_proj.weight": weight["attn_output"],
        }

    def ffn(self, index: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """One layer's FFN weights: gate (F, D), up (F, D), down (D, F)."""
        gate, up, down = (self._weight(f"blk.{index}.ffn_{name}") for name in ("gate", "up", "down"))
        return gate, up, down

    def _weight(self, name: str) -> FloatArray:
        tensor = self._tensors[f"{name}.weight"]
        # Unquantised tensors come as views of the read-only file, which torch would warn about.
        return np.require(dequantize(tensor.data, tensor.tensor_type), np.float32, "W")


def _half_split(weight: FloatArray, num_heads: int) -> FloatArray:
    """Undo llama.cpp's row order for rotary embeddings: pairs (2i, 2i+1) back to HF's halves (i, i + head_dim/2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))
