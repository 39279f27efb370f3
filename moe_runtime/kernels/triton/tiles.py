"""The tiles of a grouped product, and a small performance model that chooses one if none was tuned for this GPU.

The model is a roofline per program. A program multiplies `block_m x block_n x K` at the share of the chip's rate that
its instruction reaches, reads its operands through L2, and has a start-up cost. It first decodes quantised weights, on
the chip's ordinary cores. Programs that fit an SM together
overlap. No product is faster than reading the weights of the used slots from memory. The tile with the least time wins.
So few rows per slot get few rows per tile: reading weights takes all the time, and padding is free only if it is small.
Many rows get the largest tile, because each weight read serves more rows.

Shape suffixes: R grouped rows, S slots, D hidden, F expert intermediate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """How one program cuts a product.

    Attributes:
        block_m: rows.
        block_n: weight rows; in the fused product half of them are the gate's and half the up projection's.
        block_k: input features per step.
        num_warps: warps of a program.
        num_stages: depth of the load pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k} {self.num_warps} warps {self.num_stages} stages"

    def shared_bytes(self, itemsize: int) -> int:
        """Upper limit of a program's shared memory: every stage of the pipeline holds a piece of both operands."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize


@dataclass(frozen=True)
class Chip:
    """The model's figures for a GPU generation, from the vendor's data sheets.

    Attributes:
        name: the card with these figures.
        num_sms: multiprocessors.
        flops: dense products of 16-bit numbers per second, in FLOP/s.
        bytes_per_s: of device memory.
        shared_bytes: shared memory that one program may take.
        old_mma: share of `flops` that `mma.sync` reaches; tiles of fewer than 64 rows use it on every chip.
    """

    name: str
    num_sms: int
    flops: float
    bytes_per_s: float
    shared_bytes: int
    old_mma: float = 1.0

    @property
    def has_new_mma(self) -> bool:
        """Whether there is a faster instruction than `mma.sync`."""
        return self.old_mma < 1.0


CHIPS: dict[tuple[int, int], Chip] = {
    (8, 0): Chip("A100", 108, 312e12, 2.0e12, 163 * 1024),
    (8, 6): Chip("A40", 84, 150e12, 0.7e12, 99 * 1024),
    (8, 9): Chip("L40S", 142, 362e12, 0.86e12, 99 * 1024),
    (9, 0): Chip("H100", 132, 989e12, 3.35e12, 227 * 1024, old_mma=0.6),
    (10, 0): Chip("B200", 148, 2250e12, 8.0e12, 227 * 1024, old_mma=0.4),
    (12, 0): Chip("RTX PRO 6000", 188, 500e12, 1.8e12, 99 * 1024),
}
L2_SPEEDUP = 3.0  # speed of reads from L2, relative to memory
START_S = 2e-6  # time to fill the pipeline, and of the epilogue

TILES_16_BIT: tuple[Tile, ...] = (
    Tile(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=4),
    Tile(block_m=16, block_n=128, block_k=64, num_warps=4, num_stages=4),
    Tile(block_m=32, block_n=128, block_k=64, num_warps=4, num_stages=4),
    Tile(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3),
    Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3),
)
# float32 is multiplied without tensor cores, to keep all its bits; registers limit the tile.
TILES_32_BIT: tuple[Tile, ...] = (
    Tile(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=3),
    Tile(block_m=64, block_n=64, block_k=32, num_warps=8, num_stages=3),
)
MAX_QUANTIZED_N = 128  # weight rows of a tile; more leave no registers for decoding where sums are in registers too
FLOAT32_FLOPS = 1 / 15  # float32 products on ordinary cores, relative to 16-bit products on tensor cores
DECODE_FLOPS = 16  # of ordinary cores, for a quantised weight: 8 instructions, in place of as many multiply-adds


def shipped_tiles(dtype: torch.dtype, *, quantized: bool = False) -> tuple[Tile, ...]:
    """All tiles of rows of a dtype, with weights of the same dtype or quantised ones.

    Raises:
        ValueError: the dtype has no kernel.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return tuple(tile for tile in TILES_16_BIT if not quantized or tile.block_n <= MAX_QUANTIZED_N)
    if dtype == torch.float32:
        return TILES_32_BIT
    raise ValueError(f"dtype: {dtype} is not allowed; it must be bfloat16, float16 or float32")


def tiles_that_fit(dtype: torch.dtype, chip: Chip, *, quantized: bool = False) -> list[Tile]:
    """The shipped tiles that fit a chip's shared memory."""
    tiles = shipped_tiles(dtype, quantized=quantized)
    return [tile for tile in tiles if tile.shared_bytes(dtype.itemsize) <= chip.shared_bytes]


def invariant_tile(dtype: torch.dtype) -> Tile:
    """The one tile of batch-invariant products, for any number of rows.

    It has 64 rows. Decode pads its rows to 64, which costs no bandwidth. Prefill still reads each weight once per 64
    rows, with the tensor-core instruction of the chip's generation.

    Raises:
        ValueError: the dtype has no kernel.
    """
    return next(tile for tile in shipped_tiles(dtype) if tile.block_m == 64)


def chip_of(device: torch.device) -> Chip:
    """The newest known chip that is not newer than the device; the H100 for the interpreter, which has no chip."""
    if device.type != "cuda":
        return CHIPS[9, 0]
    capability = torch.cuda.get_device_capability(device)
    return CHIPS[max((known for known in CHIPS if known <= capability), default=(8, 0))]


def rows_bucket(num_rows: int) -> int:
    """The number of rows, rounded up to a power of two."""
    return 1 << max(0, num_rows - 1).bit_length()


def product_seconds(
    tile: Tile,
    num_rows: int,
    num_slots: int,
    outputs: int,
    inputs: int,
    itemsize: int,
    chip: Chip,
    weight_bits: int | None,
) -> float:
    """The model's time of a product, rows spread at random over the slots; `weight_bits` is None for dense weights."""
    weight_bytes = itemsize if weight_bits is None else weight_bits / 8
    active = num_slots * (1 - (1 - 1 / num_slots) ** num_rows)
    num_tiles = active * math.ceil(num_rows / active / tile.block_m)
    resident = max(1, chip.shared_bytes // tile.shared_bytes(itemsize))
    flops = chip.flops / chip.num_sms * (chip.old_mma if tile.block_m < 64 else 1.0)
    flops *= FLOAT32_FLOPS if itemsize == 4 else 1.0
    cached_bytes_per_s = chip.bytes_per_s * L2_SPEEDUP / chip.num_sms
    num_programs = num_tiles * math.ceil(outputs / tile.block_n)
    together = min(resident, math.ceil(num_programs / chip.num_sms))
    waves = math.ceil(num_programs / (chip.num_sms * together))
    math_s = 2 * tile.block_m * tile.block_n * inputs / flops
    if weight_bits is not None:
        math_s += DECODE_FLOPS * tile.block_n * inputs / (FLOAT32_FLOPS * chip.flops / chip.num_sms)
    read_s = (tile.block_m * itemsize + tile.block_n * weight_bytes) * inputs / cached_bytes_per_s
    weights_s = active * outputs * inputs * weight_bytes / chip.bytes_per_s
    return max(weights_s, waves * together * max(math_s, read_s)) + START_S * waves


def expected_seconds(
    tile: Tile,
    num_rows: int,
    num_slots: int,
    hidden: int,
    intermediate: int,
    itemsize: int,
    chip: Chip,
    weight_bits: int | None = None,
) -> float:
    """The model's time of both products of the expert MLP."""
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    return sum(product_seconds(tile, num_rows, num_slots, *shape, itemsize, chip, weight_bits) for shape in shapes)


@cache
def model_tile(
    num_rows: int,
    num_slots: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    chip: Chip,
    weight_bits: int | None = None,
) -> Tile:
    """The tile that the model predicts to be fastest; among equals the smallest.

    Raises:
        ValueError: the dtype has no kernel.
    """
    shape = (num_rows, num_slots, hidden, intermediate, dtype.itemsize, chip, weight_bits)
    tiles = tiles_that_fit(dtype, chip, quantized=weight_bits is not None)
    return min(tiles, key=lambda tile: expected_seconds(tile, *shape))


@cache
def linear_tile(num_rows: int, outputs: int, inputs: int, dtype: torch.dtype, weight_bits: int, chip: Chip) -> Tile:
    """`model_tile` of a product with one quantised matrix `[outputs, inputs]`.

    Raises:
        ValueError: the dtype has no kernel.
    """
    shape = (num_rows, 1, outputs, inputs, dtype.itemsize, chip, weight_bits)
    return min(tiles_that_fit(dtype, chip, quantized=True), key=lambda tile: product_seconds(tile, *shape))
