"""Integers of 4 or 8 bits, packed into int32, the first in the low bits; their zeros lie in the middle of the range.

- `pack-quantized` of compressed-tensors: `weight_packed` [N, K / 8] along the inputs, `weight_zero_point` [N / 8, G]
  along the outputs. weight = (code - zero) * scale.
- GPTQ: `qweight` [K / 8, N] along the inputs, `qzeros` [G, N / 8] along the outputs, `scales` [G, N]. Zeros are stored
  less 1, modulo 2^bits, except in `gptq_v2`. Input k belongs to the group `g_idx[k]`.
- AWQ ("gemm"): `qweight` [K, N / 8] and `qzeros` [G, N / 8] along the outputs, of which a word has `AWQ_ORDER`.

Shape suffixes: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix, pack_halves
from moe_runtime.types.weight_format import Scale, WeightFormat
from moe_runtime.weights.checkpoint import ALL_ROWS, READABLE, Checkpoint
from moe_runtime.weights.formats.stored import WORDS, StoredRows, as_bytes, signed, unpack
from moe_runtime.weights.scheme import Layout, Storage, part_name

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SCALES = {"F32": Scale.FLOAT32, "F16": Scale.FLOAT16, "BF16": Scale.BFLOAT16}
SHAPES = {"I64": torch.int64, "I32": torch.int32}
GROUP_OF_INPUT = "g_idx"
LAYOUTS = {Layout.PACKED, Layout.AWQ, Layout.GPTQ, Layout.GPTQ_V2}


def stored_format(checkpoint: Checkpoint, name: str, storage: Storage) -> WeightFormat:
    """The format of a matrix; scales of integers have the type that they have in the file."""
    if storage.layout not in LAYOUTS:
        return storage.format
    scale = SCALES.get(checkpoint.stored(part_name(name, storage.scales)).dtype)
    return dataclasses.replace(storage.format, scale=scale or storage.format.scale)


def read_packed(rows: StoredRows, storage: Storage) -> QuantizedMatrix:
    """Rows of a matrix of compressed-tensors."""
    _check_shape(rows)
    format = stored_format(rows.checkpoint, rows.name, storage)
    bits, inputs = format.code.bits, rows.num_inputs
    words = rows.read(storage.codes, WORDS, rows.num_outputs, -(-inputs * bits // 32))
    codes = signed(words.view(torch.uint8)[:, : -(-inputs * bits // 8)].contiguous(), bits)
    zeros_NG = None
    if format.has_zero:
        fit = 32 // bits  # in a word
        words = rows.read(
            "weight_zero_point",
            WORDS,
            -(-rows.num_outputs // fit),
            format.num_groups(inputs),
            rows=slice(rows.first // fit, -(-rows.end // fit)),
        )
        start = rows.first % fit
        zeros_NG = signed(unpack(words.T, bits).T[start : start + len(codes)], bits).contiguous()
    scales_NG = rows.read_scales(storage.scales, READABLE, format)
    return QuantizedMatrix(format, codes, scales_NG, zeros_NG, None, inputs)


def _check_shape(rows: StoredRows) -> None:
    """Raise ValueError if the file says that a matrix of compressed-tensors is another one than the model has."""
    shape, key = [rows.num_outputs, rows.num_inputs], part_name(rows.name, "weight_shape")
    if rows.index is None and rows.checkpoint.has(key):
        found = rows.checkpoint.read_stored(key, SHAPES, (2,)).tolist()
        if found != shape:
            raise ValueError(f"model: tensor {key!r} says {found}, but the configuration means {shape}")
    key = part_name(rows.name, "weight_g_idx")
    if rows.checkpoint.has(key):
        raise ValueError(f"model: tensor {key!r} is not supported: groups must be of adjacent inputs")


def read_awq(rows: StoredRows, storage: Storage) -> QuantizedMatrix:
    """A whole matrix of AWQ."""
    format = stored_format(rows.checkpoint, rows.name, storage)
    outputs, inputs = rows.num_outputs, rows.num_inputs
    groups, width = format.num_groups(inputs), -(-outputs // 8)
    order = torch.tensor(AWQ_ORDER).argsort()

    def unpacked(part: str, count: int) -> Tensor:
        numbers = unpack(rows.read(part, WORDS, count, width, rows=ALL_ROWS), 4)
        return numbers.view(count, width, 8)[:, :, order].flatten(1)[:, :outputs].T.contiguous()

    codes = pack_halves(unpacked(storage.codes, inputs))
    scales_NG = rows.read(storage.scales, READABLE, groups, outputs, rows=ALL_ROWS).T.contiguous()
    return QuantizedMatrix(format, codes, scales_NG, unpacked("qzeros", groups), None, inputs)


def read_gptq(rows: StoredRows, storage: Storage) -> QuantizedMatrix:
    """A whole matrix of GPTQ whose groups are of adjacent inputs."""
    format = stored_format(rows.checkpoint, rows.name, storage)
    bits, outputs, inputs = format.code.bits, rows.num_outputs, rows.num_inputs
    groups = format.num_groups(inputs)
    words = rows.read(storage.codes, WORDS, -(-inputs * bits // 32), outputs, rows=ALL_ROWS)
    codes = signed(as_bytes(words.T)[:, : -(-inputs * bits // 8)].contiguous(), bits)
    scales_NG = rows.read(storage.scales, READABLE, groups, outputs, rows=ALL_ROWS).T.contiguous()
    words = rows.read("qzeros", WORDS, groups, -(-outputs * bits // 32), rows=ALL_ROWS)
    zeros_NG = unpack(words, bits)[:, :outputs].T.contiguous() + int(storage.layout is Layout.GPTQ)
    zeros_NG &= (1 << bits) - 1
    if format.has_zero:
        return QuantizedMatrix(format, codes, scales_NG, signed(zeros_NG, bits), None, inputs)
    middle = 1 << bits - 1
    if not (zeros_NG == middle).all():
        name, found = part_name(rows.name, "qzeros"), int(zeros_NG[zeros_NG != middle][0])
        raise ValueError(f"model: tensor {name!r} has the zero {found}, but sym means that all are {middle}")
    return QuantizedMatrix(format, codes, scales_NG, None, None, inputs)


def is_act_ordered(checkpoint: Checkpoint, name: str, storage: Storage) -> bool:
    """Whether a matrix of GPTQ has groups of inputs that are not adjacent."""
    key, group = part_name(name, GROUP_OF_INPUT), storage.format.group
    if group is None or not checkpoint.has(key):
        return False
    group_K = checkpoint.read_stored(key, WORDS, checkpoint.stored(key).shape)
    return not torch.equal(group_K, torch.arange(len(group_K), dtype=torch.int32) // group)


def dequantize_gptq(rows: StoredRows, storage: Storage) -> Tensor:
    """A whole matrix of GPTQ whose inputs belong to any groups (act order), float32 `[N, K]`."""
    matrix = read_gptq(rows, storage)
    group_K = rows.read(GROUP_OF_INPUT, WORDS, matrix.num_inputs, rows=ALL_ROWS)
    last = storage.format.num_groups(matrix.num_inputs) - 1
    if not 0 <= int(group_K.min()) <= int(group_K.max()) <= last:
        name, found = part_name(rows.name, GROUP_OF_INPUT), [int(group_K.min()), int(group_K.max())]
        raise ValueError(f"model: tensor {name!r} has values from {found[0]} to {found[1]}; groups are 0 to {last}")
    zeros_NK = None if matrix.zeros_NG is None else matrix.zeros_NG[:, group_K]
    scales_NK = matrix.scales_NG[:, group_K]
    each_input = dataclasses.replace(matrix.format, group=1)
    return QuantizedMatrix(each_input, matrix.codes, scales_NK, zeros_NK, None, matrix.num_inputs).dequantize()
