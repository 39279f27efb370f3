"""Write the model that the benchmarks run: a `qwen3_moe` checkpoint with random weights, the same for the same seed.

`bench` is small enough for any machine (1.31 B parameters, 2.6 GB in bfloat16); `--gguf` writes the same weights for
llama.cpp too. `olmoe` is the shape of OLMoE-1B-7B (6.9 B parameters) and gets a `config.json` only; its weights come
from `load_format="dummy"`. Folders are in the cache (`$MOE_RUNTIME_CACHE`, else `$XDG_CACHE_HOME/moe-runtime`,
else `~/.cache/moe-runtime`). Complete files are not written again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from moe_runtime.system.cache_folder import default_cache_dir

SEED = 0
STD = 0.02
NORM_STD = 0.1  # around 1, so that a missing norm is noticed
STD_OF = {
    "model.embed_tokens.weight": 0.3,  # about what attention adds, so that a prompt's tokens spread over the experts
    "lm_head.weight": 0.1,  # logits spread as in a trained model (deviation about 3), so errors are visible
}
WEIGHTS, GGUF_FILE = "model.safetensors", "model-bf16.gguf"


@dataclass(frozen=True)
class Shape:
    """The sizes of a `qwen3_moe` model; names are those of `config.json`."""

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

    def config(self) -> dict[str, object]:
        """The contents of `config.json`."""
        return vars(self) | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "torch_dtype": "bfloat16",
            "attention_bias": False,
            "bos_token_id": None,
            "decoder_sparse_step": 1,
            "eos_token_id": None,
            "hidden_act": "silu",
            "initializer_range": STD,
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "max_position_embeddings": 4096,
            "mlp_only_layers": [],
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint."""
        hidden, inner, d = self.hidden_size, self.moe_intermediate_size, self.head_dim
        queries, keys = self.num_attention_heads * d, self.num_key_value_heads * d
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                yield f"{prefix}.self_attn.{name}.weight", (rows, hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
            yield f"{prefix}.self_attn.q_norm.weight", (d,)
            yield f"{prefix}.self_attn.k_norm.weight", (d,)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
            yield f"{prefix}.mlp.gate.weight", (self.num_experts, hidden)
            for expert in range(self.num_experts):
                for name, size in (
                    ("gate_proj", (inner, hidden)),
                    ("up_proj", (inner, hidden)),
                    ("down_proj", (hidden, inner)),
                ):
                    yield f"{prefix}.mlp.experts.{expert}.{name}.weight", size
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab_size, hidden)


SHAPES = {
    "bench": Shape(12, 1024, 16, 4, 64, 64, 8, 512, 32000),
    "olmoe": Shape(16, 2048, 16, 16, 128, 64, 8, 1024, 50304, norm_topk_prob=False),
}


def ensure_bench_model(shape: str, folder: Path | None = None) -> Path:
    """The folder of the model, written first if it is not there.

    Args:
        shape: a name in `SHAPES`.
        folder: default `bench-model/<shape>` in the cache.
    """
    folder = folder or default_cache_dir() / "bench-model" / shape
    folder.mkdir(parents=True, exist_ok=True)
    sizes, weights = SHAPES[shape], folder / WEIGHTS
    if shape != "olmoe" and not (weights.exists() and _recipe_of(weights) == _recipe(sizes)):
        _write_weights(sizes, weights)
        (folder / GGUF_FILE).unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes.config(), indent=2) + "\n")
    return folder


def ensure_gguf(folder: Path) -> Path:
    """A folder's model from `ensure_bench_model` as a GGUF file without a tokenizer; the weights have the same bits."""
    path = folder / GGUF_FILE
    if not path.exists():
        partial = path.with_suffix(".partial")
        _write_gguf(json.loads((folder / "config.json").read_text()), folder / WEIGHTS, partial)
        partial.rename(path)
    return path


def _recipe(shape: Shape) -> str:
    """A description of how the weights are made; it is stored in their file."""
    return json.dumps(vars(shape) | {"seed": SEED, "std": STD, "norm_std": NORM_STD, "std_of": STD_OF})


def _recipe_of(path: Path) -> str:
    with safe_open(path, framework="pt") as source:
        return str(source.metadata().get("recipe"))


def _write_weights(shape: Shape, path: Path) -> None:
    def make(entry: tuple[str, tuple[int, ...]]) -> tuple[str, Tensor]:
        name, size = entry
        digest = hashlib.blake2b(f"{SEED}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        std = NORM_STD if len(size) == 1 else STD_OF.get(name, STD)
        tensor = torch.empty(size).normal_(1.0 if len(size) == 1 else 0.0, std, generator=generator)
        return name, tensor.bfloat16()

    entries = list(shape.tensors())
    with ThreadPoolExecutor(2) as pool:
        made = dict(tqdm(pool.map(make, entries), total=len(entries), unit="tensor", desc="making random weights"))
    partial = path.with_suffix(".partial")
    save_file(made, partial, metadata={"format": "pt", "recipe": _recipe(shape)})
    partial.rename(path)


def _write_gguf(config: dict[str, int], weights: Path, path: Path) -> None:
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")

    with safe_open(weights, framework="pt") as source:

        def add(name: str, tensor: Tensor) -> None:
            # llama.cpp needs norms and gates in float32; the conversion from bfloat16 is exact.
            if tensor.ndim == 1 or "ffn_gate_inp" in name:
                writer.add_tensor(name, tensor.float().numpy())
            else:
                raw = tensor.contiguous().view(torch.uint8).numpy()
                writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

        add("token_embd.weight", source.get_tensor("model.embed_tokens.weight"))
        add("output_norm.weight", source.get_tensor("model.norm.weight"))
        add("output.weight", source.get_tensor("lm_head.weight"))
        for layer in tqdm(range(layers), unit="layer", desc="reading weights for the GGUF file"):
            theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
            for their_name, our_name in GGUF_NAMES.items():
                add(f"{theirs}.{their_name}.weight", source.get_tensor(f"{ours}.{our_name}.weight"))
            for part in ("gate", "up", "down"):
                stored = [source.get_tensor(f"{ours}.mlp.experts.{e}.{part}_proj.weight") for e in range(experts)]
                add(f"{theirs}.ffn_{part}_exps.weight", torch.stack(stored))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=sys.stderr.isatty())
        writer.close()


GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="bench")
    parser.add_argument("--out", type=Path, help="folder; default bench-model/SHAPE in the cache")
    parser.add_argument("--gguf", action="store_true", help="write model-bf16.gguf beside it (not for olmoe)")
    options = parser.parse_args()
    if options.gguf and options.shape == "olmoe":
        parser.error("--gguf: olmoe has no weights on disk; it must be left out")
    folder = ensure_bench_model(options.shape, options.out)
    print(folder)
    if options.gguf:
        print(ensure_gguf(folder))


if __name__ == "__main__":
    main()
