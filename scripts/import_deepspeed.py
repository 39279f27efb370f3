"""Convert a DeepSpeed-MoE checkpoint to a Hugging Face one: safetensors files with the tensor names of its family.

The family is the `model_type` of the config.json in the checkpoint's folder. Tensors keep their dtype. The other files
of a model (configuration, tokenizer) are copied.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moe_runtime.models.registry import open_deepspeed, read_model_config
from moe_runtime.weights.deepspeed import DeepSpeedCheckpoint
from moe_runtime.weights.deepspeed_files import DeepSpeedFiles

ALSO_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")


def convert(checkpoint: Path, output: Path, max_shard_bytes: int) -> int:
    """Write the checkpoint into the new folder `output`, in files of at most `max_shard_bytes`; returns how many.

    Raises:
        ValueError: there is no such checkpoint, it is incomplete, or `output` exists.
    """
    config = read_model_config(checkpoint)
    files = DeepSpeedFiles.find(checkpoint)
    if files is None:
        raise ValueError(f"checkpoint: {checkpoint} is no DeepSpeed checkpoint")
    if output.exists():
        raise ValueError(f"output: {output} exists; give a new folder")
    source = open_deepspeed(files, config)
    output.mkdir(parents=True)
    try:
        num_shards = _copy_weights(source, config.tie_word_embeddings, output, max_shard_bytes)
        for pattern in ALSO_COPIED:
            for file in checkpoint.glob(pattern):
                shutil.copy(file, output)
    except BaseException:
        shutil.rmtree(output)  # never leave an incomplete checkpoint
        raise
    return num_shards


def _copy_weights(source: DeepSpeedCheckpoint, tied_head: bool, output: Path, max_shard_bytes: int) -> int:
    names = [name for name in source.names if not (name == "lm_head.weight" and tied_head)]
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0
    for name in names:
        tensor = source.read_any(name)
        if shard and size + tensor.nbytes > max_shard_bytes:
            shards.append(_write(shard, output, len(shards)))
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_write(shard, output, len(shards)))
    _write_index(output, shards, total)
    return len(shards)


def _write(shard: dict[str, Tensor], output: Path, index: int) -> list[str]:
    save_file(shard, output / f"{index}.safetensors", metadata={"format": "pt"})
    return list(shard)


def _write_index(output: Path, shards: list[list[str]], total: int) -> None:
    """Give the files their names, which contain the number of files, and write the index of tensors."""
    if len(shards) == 1:
        (output / "0.safetensors").rename(output / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = output / f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (output / f"{index}.safetensors").rename(file)
        weight_map |= dict.fromkeys(names, file.name)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the folder given to save_checkpoint, with config.json in it")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--max-shard-bytes", type=int, default=4 << 30, help="largest file (default: 4 GiB)")
    options = parser.parse_args()
    try:
        num_files = convert(options.checkpoint, options.output, options.max_shard_bytes)
    except ValueError as error:
        print(f"import_deepspeed: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {num_files} file(s) of weights to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
