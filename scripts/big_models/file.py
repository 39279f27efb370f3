"""Writes a GGUF file of random weights, some rows at a time, so that memory does not grow with the model.

Quantised weights have random codes. The mean of all codes' values need not be 0, so Q4_0's scales have either sign.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from bench_model.gguf_file import describe
from gguf import GGMLQuantizationType as Kind
from tqdm import tqdm

from big_models.models import BigModel, StoredTensor

SEED = 0
PIECE_WEIGHTS = 1 << 24  # made at once
POOL = 1 << 16  # normal numbers of which a piece's floats are drawn, which takes a tenth of the time of new ones
SPARE_BYTES = 1 << 30  # of the disk, left free
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
# Root mean squares of Q4_0's codes, -8 to 7, and of E2M1's values: a weight's deviation for a scale of 1.
Q4_0_RMS, E2M1_RMS = 21.5**0.5, 8.5625**0.5
E8M0_BIAS = 127


def write_model(model: BigModel, path: Path) -> None:
    """Write the file; the same bytes each time. An interrupted run leaves nothing.

    Raises:
        ValueError: the disk has less free space than the file needs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(path.parent).free, model.nbytes + SPARE_BYTES
    if free < needed:
        raise ValueError(
            f"folder: {path.parent} has {free / 1e9:.1f} GB free; {model.name} needs {needed / 1e9:.1f} GB"
        )
    partial = path.with_suffix(".partial")
    try:
        _write_header(model, partial)
        with partial.open("ab") as file:
            _write_tensors(model, file)
            # The measurements that follow must not share the disk with what the system has not written yet.
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_header(model: BigModel, path: Path) -> None:
    writer = gguf.GGUFWriter(path, model.family.arch)
    describe(writer, model.config, model.file_type)
    model.family.describe(writer, model.config)
    for tensor in model.tensors:
        writer.add_tensor_info(tensor.name, tensor.size, np.dtype(np.float32), tensor.nbytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_tensors(model: BigModel, file: BinaryIO) -> None:
    random = np.random.Generator(np.random.SFC64(SEED))
    with tqdm(total=model.nbytes, unit="B", unit_scale=True, desc=f"writing {model.name}") as bar:
        for tensor in model.tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            for piece in random_pieces(tensor, random):
                file.write(piece.data)
                bar.update(piece.nbytes)
        file.write(bytes(-file.tell() % ALIGNMENT))


def random_pieces(tensor: StoredTensor, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The bytes of a tensor, uint8, some rows at a time."""
    rows = max(1, PIECE_WEIGHTS // tensor.size[-1])
    for first in range(0, tensor.num_rows, rows):
        count = min(rows, tensor.num_rows - first) * tensor.size[-1]
        yield _random_bytes(tensor.kind, count, *tensor.spread, random)


def _random_bytes(kind: Kind, count: int, mean: float, deviation: float, random: np.random.Generator) -> np.ndarray:
    """The bytes of `count` weights."""
    if kind in (Kind.F32, Kind.BF16):
        values = random.standard_normal(POOL, dtype=np.float32) * np.float32(deviation) + np.float32(mean)
        if kind is Kind.BF16:
            values = (values.view(np.uint32) >> 16).astype(np.uint16)  # rounded towards 0
        return values[random.integers(0, POOL, count, dtype=np.uint16)].view(np.uint8)
    assert mean == 0
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.frombuffer(bytearray(random.bytes(count // weights * nbytes)), np.uint8).reshape(-1, nbytes)
    if kind is Kind.Q4_0:
        scales = random.uniform(0.75, 1.25, len(blocks)) * random.choice((-1, 1), len(blocks))
        blocks[:, :2] = (scales * deviation / Q4_0_RMS).astype(np.float16)[:, None].view(np.uint8)
    else:
        assert kind is Kind.MXFP4
        nearest = round(np.log2(deviation / E2M1_RMS)) + E8M0_BIAS
        blocks[:, 0] = random.integers(nearest - 1, nearest + 1, len(blocks), dtype=np.uint8)
    return blocks.reshape(-1)
