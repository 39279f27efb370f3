"""Blocks of GGUF files: to `QuantizedMatrix`, or to the weights that they stand for.

Layouts are those of llama.cpp's ggml. A row of a matrix is a row of blocks. Each has scales and codes of 32 weights or,
in K-quants, of 256. Q8_0 is d * q, Q5_0 is d * (q - 16), Q4_1 and Q5_1 are d * q + m, Q4_0 is d * (q - 8), MXFP4 is
E2M1 * 2^(e - 127). A K-quant has scales of the scales: Q4_K and Q5_K are (d * s) * q - (m * t), Q6_K is
(d * s) * (q - 32). All is in float32. Codes of 5 and 6 bits become INT8, less what is subtracted from them.

Shape suffixes: N outputs, K inputs, B blocks of a row, b bytes of a row or block; others are written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.weights.gguf_file import FORMATS

PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LOW_HALVES = np.uint64(0x0F0F0F0F0F0F0F0F)


class _Parts(NamedTuple):
    """What blocks `[N, B, b]` have for a `QuantizedMatrix`; a block's numbers are in one or two dimensions."""

    codes: Tensor
    scales: Tensor
    factors: Tensor | None = None
    offsets: Tensor | None = None
    offset_factors: Tensor | None = None


def quantized(dtype: str, raw_Nb: Tensor, num_inputs: int) -> QuantizedMatrix:
    """A matrix of a type in `FORMATS`: its codes and scales, bit for bit.

    Args:
        dtype: the type's name.
        raw_Nb: its bytes.
    """
    num_blocks = num_inputs // (256 if dtype.endswith("_K") else 32)
    parts = READERS[dtype](raw_Nb.view(len(raw_Nb), num_blocks, raw_Nb.shape[1] // num_blocks))
    codes, scales_NG, factor_NS, offsets_NG, offset_factor_NS = (
        None if part is None else part.flatten(1).contiguous() for part in parts
    )
    assert codes is not None and scales_NG is not None
    format = FORMATS[dtype]
    return QuantizedMatrix(format, codes, scales_NG, None, factor_NS, num_inputs, offsets_NG, offset_factor_NS)


def values(dtype: str, raw_Nb: Tensor, num_inputs: int) -> Tensor:
    """The weights `[N, K]`: float32, or of the stored type where they are not quantised.

    Args:
        dtype: the type's name, one of `gguf_file.READABLE`.
        raw_Nb: its bytes.
    """
    if dtype in PLAIN_DTYPES:
        return raw_Nb.view(PLAIN_DTYPES[dtype])
    return quantized(dtype, raw_Nb, num_inputs).dequantize()


def _q8_0(blocks: Tensor) -> _Parts:
    """34 bytes: d, codes."""
    return _Parts(blocks[..., 2:], _float16(blocks[..., :2]))


def _q4_0(blocks: Tensor) -> _Parts:
    """18 bytes: d, codes."""
    return _Parts(_paired(blocks[..., 2:]), _float16(blocks[..., :2]))


def _q5_0(blocks: Tensor) -> _Parts:
    """22 bytes: d, codes of 5 bits."""
    return _Parts(_five_bits(blocks[..., 2:]) - 16, _float16(blocks[..., :2]))  # in two's complement


def _mxfp4(blocks: Tensor) -> _Parts:
    """17 bytes: e, codes."""
    return _Parts(_paired(blocks[..., 1:]), blocks[..., :1])


def _q4_1(blocks: Tensor) -> _Parts:
    """20 bytes: d, m, codes."""
    return _Parts(_paired(blocks[..., 4:]), _float16(blocks[..., :2]), offsets=_float16(blocks[..., 2:4]))


def _q5_1(blocks: Tensor) -> _Parts:
    """24 bytes: d, m, codes of 5 bits."""
    return _Parts(_five_bits(blocks[..., 4:]), _float16(blocks[..., :2]), offsets=_float16(blocks[..., 2:4]))


def _q4_k(blocks: Tensor) -> _Parts:
    """144 bytes: d, m, 12 bytes of scales, 128 of codes: the low halves of 32 bytes, then their high halves."""
    return _with_minima(blocks, _paired(blocks[..., 16:].unflatten(-1, (4, 32))))


def _q5_k(blocks: Tensor) -> _Parts:
    """176 bytes: as Q4_K, with 32 bytes of fifth bits before the codes.

    Bit j of byte i belongs to weight i of part j of eight.
    """
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = (blocks[..., None, 16:48] >> shifts) & 1
    low = _halves(blocks[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    return _with_minima(blocks, low | (fifth << 4))


def _q6_k(blocks: Tensor) -> _Parts:
    """210 bytes: 128 with low bits, 64 with high bits, 16 scales, d.

    A half of a block has 64 bytes of low bits: those of its first 64 weights, then those of the others. Its 32 bytes
    of high bits have two bits for a weight of each of its four parts.
    """
    low, high = blocks[..., :128].unflatten(-1, (2, 64)), blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    codes = (_halves(low).unflatten(-1, (4, 32)) | ((high >> shifts) & 3) << 4) - 32  # in two's complement
    return _Parts(codes, blocks[..., 192:208].view(torch.int8), _float16(blocks[..., 208:]))


READERS: dict[str, Callable[[Tensor], _Parts]] = {
    "Q8_0": _q8_0,
    "Q5_0": _q5_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
}


def _with_minima(blocks: Tensor, codes: Tensor) -> _Parts:
    """Of weights d * s * code - m * t, with 6 bits for each s and t.

    The 12 bytes of scales: s of parts 0 to 3, t of parts 0 to 3, and low halves of s and t of parts 4 to 7. Their high
    bits are the two bits that the first eight bytes do not need.
    """
    first_s, first_t, halves = blocks[..., 4:16].split(4, dim=-1)
    s = torch.cat((first_s & 63, (halves & 15) | ((first_s >> 2) & 48)), dim=-1)
    t = torch.cat((first_t & 63, (halves >> 4) | ((first_t >> 2) & 48)), dim=-1)
    d, m = _float16(blocks[..., 0:2]), _float16(blocks[..., 2:4])
    return _Parts(codes, s.view(torch.int8), d, t.view(torch.int8), -m)


def _paired(raw: Tensor) -> Tensor:
    """Codes of 4 bits with two adjacent columns in a byte. The last dimension has n bytes, a multiple of 8: their low
    halves are n columns, their high halves are the next n.

    Eight bytes at once, with numpy: models have billions of codes, and torch takes many times as long.
    """
    words = np.ascontiguousarray(raw.numpy()).view(np.uint64)
    paired = np.empty((*raw.shape[:-1], 2, raw.shape[-1] // 2), dtype=np.uint8)
    for half, shift in enumerate((0, 4)):
        low = words >> np.uint64(shift) & LOW_HALVES
        low |= low >> np.uint64(4)  # the first of two bytes gets the code of the second
        paired[..., half, :] = low.view(np.uint8)[..., ::2]
    return torch.from_numpy(paired)


def _five_bits(raw: Tensor) -> Tensor:
    """20 bytes along the last dimension to 32 codes: 4 bytes with a fifth bit of each weight, 16 with the low bits."""
    fifth = (raw[..., :4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return _halves(raw[..., 4:]) | (fifth.flatten(-2) << 4)


def _halves(raw: Tensor) -> Tensor:
    """The low halves of the bytes along the last dimension, then their high halves."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _float16(raw: Tensor) -> Tensor:
    """Numbers of two bytes each, along the last dimension."""
    return raw.contiguous().view(torch.float16)
