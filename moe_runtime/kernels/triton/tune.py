"""Measures tiles on this machine's GPU and remembers the fastest, so that serving never has to.

One JSON file per kind of GPU lies in the cache folder (`kernels/cpu/build.py` has the rule):
`{"512 slots 4096x1536 bfloat16 rows 64": [16, 64, 128, 4, 4], ...}`. It is read once, at the first product.

Shape suffixes: R grouped rows, S slots, D hidden, F expert intermediate.
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import astuple
from functools import cache
from pathlib import Path

import torch

from moe_runtime.kernels.cpu.library import default_cache_dir
from moe_runtime.kernels.triton.tiles import Tile, chip_of, model_tile, rows_bucket, tiles_that_fit

logger = logging.getLogger(__name__)

REPEATS = 7
FLUSH_BYTES = 256 << 20  # more than the L2 of any chip


def tile_key(num_rows: int, num_slots: int, hidden: int, intermediate: int, dtype: torch.dtype) -> str:
    """What a tuned tile is kept under: the layer's shape, and rows up to the next power of two."""
    name = str(dtype).removeprefix("torch.")
    return f"{num_slots} slots {hidden}x{intermediate} {name} rows {rows_bucket(num_rows)}"


def cache_file(gpu_name: str, cache_dir: Path | None = None) -> Path:
    """Where the tiles of a kind of GPU are kept; the file need not exist."""
    folder = default_cache_dir() if cache_dir is None else cache_dir
    return folder / f"tiles-{re.sub('[^a-z0-9]+', '-', gpu_name.lower()).strip('-')}.json"


def load_tiles(file: Path) -> dict[str, Tile]:
    """Tuned tiles by `tile_key`; none where there is no file.

    Raises:
        ValueError: the file holds something else; it names the file and the entry.
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
    """Write all tiles at once; whoever reads meanwhile sees the old file or the new one."""
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
    num_rows: int, num_slots: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> Tile:
    """The tile of a layer for so many rows: the tuned one, else the model's. Rows count up to a power of two.

    Raises:
        ValueError: the dtype has no kernel, or the file of tuned tiles is broken.
    """
    if tuned := tuned_tiles(device).get(tile_key(num_rows, num_slots, hidden, intermediate, dtype)):
        return tuned
    return model_tile(rows_bucket(num_rows), num_slots, hidden, intermediate, dtype, chip_of(device))


def tune(
    num_slots: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    rows: Iterable[int],
    *,
    device: torch.device | None = None,
    cache_dir: Path | None = None,
    seconds_of: Callable[[Tile, int], float] | None = None,
) -> dict[str, Tile]:
    """Time every tile that fits for each number of rows, and add the fastest to the file of this kind of GPU.

    Processes that run already keep the tiles they have read.

    Args:
        num_slots, hidden, intermediate: a layer as one rank holds it (S, D, F).
        rows: grouped rows, tokens times experts per token; spread at random over the slots.
        device: a CUDA device; default the current one.
        cache_dir: default as `default_cache_dir` says.
        seconds_of: times one tile for a number of rows; default `measure_tile` on `device`.

    Returns:
        What was found, by `tile_key`.

    Raises:
        ValueError: the device is no GPU, the dtype has no kernel, or the file is broken.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    if device.type != "cuda":
        raise ValueError(f"device: {device} is not allowed; it must be a CUDA device")
    file = cache_file(torch.cuda.get_device_name(device), cache_dir)
    tiles = load_tiles(file)
    if seconds_of is None:
        seconds_of = measure_tile(num_slots, hidden, intermediate, dtype, device)
    found = {}
    for num_rows in sorted({rows_bucket(count) for count in rows}):
        seconds = {tile: seconds_of(tile, num_rows) for tile in tiles_that_fit(dtype, chip_of(device))}
        key = tile_key(num_rows, num_slots, hidden, intermediate, dtype)
        found[key] = min(seconds, key=lambda tile: seconds[tile])
        logger.info("%s: %s, %.1f us", key, found[key], seconds[found[key]] * 1e6)
    save_tiles(file, tiles | found)
    return found


def measure_tile(
    num_slots: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> Callable[[Tile, int], float]:
    """A function that times `grouped_mlp` with a tile: median of events in seconds, L2 flushed before each run."""
    from moe_runtime.kernels.triton.grouped_gemm import grouped_mlp

    w13_SGD = torch.randn(num_slots, 2 * intermediate, hidden, device=device, dtype=dtype) * hidden**-0.5
    w2_SDF = torch.randn(num_slots, hidden, intermediate, device=device, dtype=dtype) * intermediate**-0.5
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds_of(tile: Tile, num_rows: int) -> float:
        x_RD = torch.randn(num_rows, hidden, device=device, dtype=dtype)
        counts_S = torch.bincount(torch.randint(num_slots, (num_rows,), device=device), minlength=num_slots)
        times = []
        for _ in range(REPEATS + 1):  # the first run compiles
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            grouped_mlp(x_RD, None, counts_S, w13_SGD, w2_SDF, tile=tile)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return float(statistics.median(times[1:]))

    return seconds_of
