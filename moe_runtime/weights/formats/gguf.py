"""Blocks of GGUF files: to `QuantizedMatrix`, or to the weights that they stand for.

Layouts are those of llama.cpp's ggml. A row of a matrix is a row of blocks. Each has scales and codes of 32 weights or,
in K-quants, of 256. Q8_0 is d * q, Q5_0 is d * (q - 16), Q5_1 is d * q + m, Q4_0 is d * (q - 8), MXFP4 is
E2M1 * 2^(e - 127). A K-quant has scales of the scales: Q4_K and Q5_K are (d * s) * q - (m * t), Q6_K is
(d * s) * (q - 32). All is in float32.

Shape suffixes: N outputs, K inputs, B blocks of a row, b bytes of a row; others are written out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.types.weight_format import Scale
from moe_runtime.weights.gguf_file import FORMATS

PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LOW_HALVES = np.uint64(0x0F0F0F0F0F0F0F0F)


def quantized(dtype: str, raw_Nb: Tensor, num_inputs: int) -> QuantizedMatrix:
    """A matrix of a type in `FORMATS`: its codes and scales, bit for bit.

    Args:
        dtype: the type's name.
        raw_Nb: its bytes.
    """
    format, num_blocks = FORMATS[dtype], num_inputs // 32
    blocks_NBb = raw_Nb.numpy().reshape(len(raw_Nb), num_blocks, raw_Nb.shape[1] // num_blocks)
    if format.scale is Scale.E8M0:
        scales_NB, codes_NBb = blocks_NBb[..., 0], blocks_NBb[..., 1:]
    else:
        scales_NB = np.ascontiguousarray(blocks_NBb[..., :2]).view(np.float16)[..., 0]
        codes_NBb = blocks_NBb[..., 2:]
    codes_NBb = np.ascontiguousarray(codes_NBb)
    if dtype == "Q5_0":
        codes_NBb = (_five_bits(torch.from_numpy(codes_NBb)) - 16).numpy()  # in two's complement
    elif format.code.bits == 4:
        codes_NBb = _paired(codes_NBb)
    codes, scales_NG = torch.from_numpy(codes_NBb).flatten(1), torch.from_numpy(np.ascontiguousarray(scales_NB))
    return QuantizedMatrix(format, codes, scales_NG, None, None, num_inputs)


def _paired(codes_NBb: np.ndarray) -> np.ndarray:
    """Codes of 4 bits `[N, B, 16]` with two adjacent columns in a byte; stored are columns j and j + 16 of a block.

    Eight bytes at once, with numpy: models have billions of codes, and torch takes many times as long.
    """
    words = codes_NBb.view(np.uint64)
    paired = np.empty((*codes_NBb.shape[:2], 2, 8), dtype=np.uint8)
    for half, shift in enumerate((0, 4)):
        low = words >> np.uint64(shift) & LOW_HALVES
        low |= low >> np.uint64(4)  # the first of two bytes gets the code of the second
        paired[:, :, half] = low.view(np.uint8)[..., ::2]
    return paired


def values(dtype: str, raw_Nb: Tensor, num_inputs: int) -> Tensor:
    """The weights `[N, K]`: float32, or of the stored type where they are not quantised.

    Args:
        dtype: the type's name, one of `gguf_file.READABLE`.
        raw_Nb: its bytes.
    """
    if dtype in PLAIN_DTYPES:
        return raw_Nb.view(PLAIN_DTYPES[dtype])
    if dtype in FORMATS:
        return quantized(dtype, raw_Nb, num_inputs).dequantize()
    decode, block = {"Q5_1": (_q5_1, 32), "Q4_K": (_q4_k, 256), "Q5_K": (_q5_k, 256), "Q6_K": (_q6_k, 256)}[dtype]
    return decode(raw_Nb.view(-1, raw_Nb.shape[1] * block // num_inputs)).view(-1, num_inputs)


def _q5_1(blocks: Tensor) -> Tensor:
    """Blocks `[n, 24]` to weights `[n, 32]`: d, m, codes of 5 bits."""
    numbers = _float16(blocks[:, :4]).float()
    return numbers[:, :1] * _five_bits(blocks[:, 4:]).float() + numbers[:, 1:]


def _q4_k(blocks: Tensor) -> Tensor:
    """Blocks `[n, 144]` to weights `[n, 256]`: d, m, 12 bytes of scales, 128 of codes."""
    return _with_minima(blocks, _nibbles(blocks[:, 16:]))


def _q5_k(blocks: Tensor) -> Tensor:
    """Blocks `[n, 176]` to weights `[n, 256]`: as Q4_K, with 32 bytes of fifth bits before the codes.

    Bit j of byte i belongs to weight i of part j of eight.
    """
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = (blocks[:, 16:48].unsqueeze(1) >> shifts) & 1
    return _with_minima(blocks, _nibbles(blocks[:, 48:]) | (fifth << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    """Blocks `[n, 210]` to weights `[n, 256]`: 128 bytes of low bits, 64 of high bits, 16 scales, d.

    A half of a block has 64 bytes of low bits: those of its first 64 weights, then those of the others. Its 32 bytes
    of high bits have two bits for a weight of each of its four parts.
    """
    low, high = blocks[:, :128].view(-1, 2, 64), blocks[:, 128:192].view(-1, 2, 1, 32)
    low = _halves(low).unflatten(2, (4, 32))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    codes = (low | ((high >> shifts) & 3) << 4).view(-1, 16, 16)
    scales = _float16(blocks[:, 208:]).float() * blocks[:, 192:208].view(torch.int8).float()
    weights: Tensor = scales[:, :, None] * (codes.float() - 32)
    return weights.flatten(1)


def _five_bits(raw: Tensor) -> Tensor:
    """20 bytes along the last dimension to 32 codes: 4 bytes with a fifth bit of each weight, 16 with the low bits."""
    fifth = (raw[..., :4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return _halves(raw[..., 4:]) | (fifth.flatten(-2) << 4)


def _halves(raw: Tensor) -> Tensor:
    """The low halves of the bytes along the last dimension, then their high halves."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _nibbles(raw: Tensor) -> Tensor:
    """128 bytes to codes `[n, 8, 32]`: the low halves of 32 bytes, then their high halves."""
    raw = raw.unflatten(1, (4, 32))
    return torch.stack((raw & 15, raw >> 4), dim=2).flatten(1, 2)


def _with_minima(blocks: Tensor, codes: Tensor) -> Tensor:
    """Weights `[n, 256]` of codes `[n, 8, 32]`: d * s * code - m * t, with 6 bits for each s and t.

    The 12 bytes of scales: s of parts 0 to 3, t of parts 0 to 3, and low halves of s and t of parts 4 to 7. Their high
    bits are the two bits that the first eight bytes do not need.
    """
    first_s, first_t, halves = blocks[:, 4:16].split(4, dim=1)
    s = torch.cat((first_s & 63, (halves & 15) | ((first_s >> 2) & 48)), dim=1)
    t = torch.cat((first_t & 63, (halves >> 4) | ((first_t >> 2) & 48)), dim=1)
    scale = _float16(blocks[:, 0:2]).float() * s.float()
    minimum = _float16(blocks[:, 2:4]).float() * t.float()
    return (scale[:, :, None] * codes.float() - minimum[:, :, None]).flatten(1)


def _float16(raw: Tensor) -> Tensor:
    """Numbers of two bytes each, along the last dimension."""
    return raw.contiguous().view(torch.float16)
