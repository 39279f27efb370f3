"""Measures tiles on this machine's GPU; `tuned` stores the fastest, so that serving never has to measure.

Shape suffixes: R grouped rows, S slots, D hidden, F expert intermediate.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from moe_runtime.kernels.triton.grouped_gemm import grouped_mlp
from moe_runtime.kernels.triton.tiles import Tile, chip_of, rows_bucket, tiles_that_fit
from moe_runtime.kernels.triton.tuned import cache_file, load_tiles, save_tiles, tile_key

logger = logging.getLogger(__name__)

REPEATS = 7
FLUSH_BYTES = 256 << 20  # more than the L2 of any chip


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

    Running processes keep the tiles that they have read.

    Args:
        num_slots, hidden, intermediate: the layer's shape on one rank (S, D, F).
        rows: grouped rows, tokens times experts per token; spread at random over the slots.
        device: a CUDA device; default the current one.
        cache_dir: default as `default_cache_dir` says.
        seconds_of: times one tile for a number of rows; default `measure_tile` on `device`.

    Returns:
        The fastest tiles, by `tile_key`.

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
