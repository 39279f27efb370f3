"""Write a model that the benchmarks run: a checkpoint with random weights, the same for the same seed.

The shapes are small enough for any machine (1.3 B parameters, 2.6 GB in bfloat16): `bench` is a `qwen3_moe`,
`bench-mla` a `deepseek_v3` with latent attention, `bench-gpt-oss` a `gpt_oss`. `--gguf` writes the same weights for
llama.cpp too, as they are or quantised. `olmoe` is the shape of OLMoE-1B-7B as a `qwen3_moe` (6.9 B parameters) and
gets a `config.json` only; its weights come from `load_format="dummy"`. Folders are in the cache (`$MOE_RUNTIME_CACHE`,
else `$XDG_CACHE_HOME/moe-runtime`, else `~/.cache/moe-runtime`). Complete files are not written again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from moe_runtime.system.cache_folder import default_cache_dir

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set

from bench_model.gguf_file import write_gguf
from bench_model.shapes import DeepseekV3, GptOss, Qwen3Moe, Shape
from bench_model.weights import ensure_weights

SEED = 0
WEIGHTS = "model.safetensors"
GGUF_KINDS = ("bf16", "q8_0", "q4_0")
SHAPES: dict[str, Shape] = {
    "bench": Qwen3Moe(
        num_hidden_layers=12,
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        vocab_size=32000,
    ),
    "bench-mla": DeepseekV3(
        num_hidden_layers=12,
        hidden_size=1024,
        num_attention_heads=16,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        num_experts_per_tok=8,
        n_shared_experts=1,
        moe_intermediate_size=512,
        first_k_dense_replace=1,
        intermediate_size=4096,
        vocab_size=32000,
    ),
    "bench-gpt-oss": GptOss(
        num_hidden_layers=12,
        hidden_size=1024,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=128,
        num_local_experts=32,
        num_experts_per_tok=4,
        intermediate_size=1024,
        vocab_size=32000,
    ),
    "olmoe": Qwen3Moe(
        num_hidden_layers=16,
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=1024,
        vocab_size=50304,
        norm_topk_prob=False,
    ),
}


def ensure_bench_model(shape: str, folder: Path | None = None) -> Path:
    """The folder of the model, written first if it is not there.

    Args:
        shape: a name in `SHAPES`.
        folder: default `bench-model/<shape>` in the cache.
    """
    folder = folder or default_cache_dir() / "bench-model" / shape
    folder.mkdir(parents=True, exist_ok=True)
    sizes = SHAPES[shape]
    if shape != "olmoe" and ensure_weights(sizes, SEED, folder / WEIGHTS):
        for old in folder.glob("*.gguf"):
            old.unlink()
    (folder / "config.json").write_text(json.dumps(sizes.config(), indent=2) + "\n")
    return folder


def ensure_gguf(folder: Path, kind: str = "bf16") -> Path:
    """A folder's model from `ensure_bench_model` as a GGUF file without a tokenizer, in a kind of `GGUF_KINDS`."""
    path = folder / f"model-{kind}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        write_gguf(json.loads((folder / "config.json").read_text()), folder / WEIGHTS, partial, kind)
        partial.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="bench")
    parser.add_argument("--out", type=Path, help="folder; default bench-model/SHAPE in the cache")
    parser.add_argument("--gguf", choices=GGUF_KINDS, nargs="?", const="bf16", help="write a GGUF file (not for olmoe)")
    options = parser.parse_args()
    if options.gguf and options.shape == "olmoe":
        parser.error("--gguf: olmoe has no weights on disk; it must be left out")
    folder = ensure_bench_model(options.shape, options.out)
    print(folder)
    if options.gguf:
        print(ensure_gguf(folder, options.gguf))


if __name__ == "__main__":
    main()
