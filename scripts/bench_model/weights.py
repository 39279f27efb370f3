"""Random weights of a shape, the same for the same seed, in one safetensors file that also says how they were made."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from bench_model.shapes import Shape, Size


def ensure_weights(shape: Shape, seed: int, path: Path) -> bool:
    """Write the weights in bfloat16 unless the file already has just these. Whether it was written."""
    recipe = json.dumps(shape.recipe() | {"seed": seed})
    if path.exists() and _recipe_of(path) == recipe:
        return False

    def make(entry: tuple[str, Size]) -> tuple[str, Tensor]:
        name, size = entry
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        tensor = torch.empty(size).normal_(*shape.spread(name), generator=generator)
        return name, tensor.bfloat16()

    entries = list(shape.tensors())
    with ThreadPoolExecutor(2) as pool:
        made = dict(tqdm(pool.map(make, entries), total=len(entries), unit="tensor", desc="making random weights"))
    partial = path.with_suffix(".partial")
    save_file(made, partial, metadata={"format": "pt", "recipe": recipe})
    partial.rename(path)
    return True


def _recipe_of(path: Path) -> str:
    with safe_open(path, framework="pt") as source:
        return str(source.metadata().get("recipe"))
