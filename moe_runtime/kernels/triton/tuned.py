"""Tiles that were tuned on this kind of GPU, and the choice between them and the performance model's tile.

The cache folder (see `system/cache_folder.py`) has one JSON file per kind of GPU:
`{"512 slots 4096x1536 bfloat16 rows 64": [16, 64, 128, 4, 4], ...}`. It is read once, at the first product.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import astuple
from functools import cache
from pathlib import Path

import torch

from moe_runtime.kernels.triton.tiles import Tile, chip_of, model_tile, rows_bucket
from moe_runtime.system.cache_folder import default_cache_dir
from moe_runtime.types.weight_format import WeightFormat


def tile_key(num_rows: int, num_slots: int, hidden: int, intermediate: int, dtype: torch.dtype) -> str:
    """The key of a tuned tile: the layer's shape, and rows rounded up to a power of two."""
    name = str(dtype).removeprefix("torch.")
    return f"{num_slots} slots {hidden}x{intermediate} {name} rows {rows_bucket(num_rows)}"


def cache_file(gpu_name: str, cache_dir: Path | None = None) -> Path:
    """The file of tuned tiles for a kind of GPU; it need not exist."""
    folder = default_cache_dir() if cache_dir is None else cache_dir
    return folder / f"tiles-{re.sub('[^a-z0-9]+', '-', gpu_name.lower()).strip('-')}.json"


def load_tiles(file: Path) -> dict[str, Tile]:
    """Tuned tiles by `tile_key`; empty if there is no file.

    Raises:
        ValueError: the file holds something else; the error names the file and the entry.
    """
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text())
        return {key: _read_tile(key, numbers) for key, numbers in entries.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not a file of tuned tiles ({error}); delete it or tune again") from None


def _read_tile(key: str, numbers: object) -> Tile:
    if not isinstance(numbers, list) or len(numbers) != 5 or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ValueError(f"{key}: {numbers!r} is not allowed; it must be five positive integers")
    return Tile(*numbers)


def save_tiles(file: Path, tiles: dict[str, Tile]) -> None:
    """Write all tiles atomically: a concurrent reader sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps({key: astuple(tiles[key]) for key in sorted(tiles)}, indent=1) + "\n")
    partial.replace(file)


@cache
def tuned_tiles(device: torch.device) -> dict[str, Tile]:
    """The tiles that were tuned on this kind of GPU before; read from disk once."""
    if device.type != "cuda":
        return {}
    return load_tiles(cache_file(torch.cuda.get_device_name(device)))


def choose_tile(
    num_rows: int,
    num_slots: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    device: torch.device,
    format: WeightFormat | None = None,
) -> Tile:
    """The tile of a layer for `num_rows` rows, rounded up to a power of two: the tuned tile, else the model's.

    Tiles are tuned for dense weights only; `format` is that of quantised ones.

    Raises:
        ValueError: the dtype has no kernel, or the file of tuned tiles is broken.
    """
    shape = (rows_bucket(num_rows), num_slots, hidden, intermediate, dtype)
    if format is not None:
        return model_tile(*shape, chip_of(device), format.code.bits)
    if tuned := tuned_tiles(device).get(tile_key(*shape)):
        return tuned
    return model_tile(*shape, chip_of(device))
