"""Packs weights as K-quants of GGUF, which the `gguf` package only reads. To nearest, in the simplest way.

Shape suffixes: n blocks of 256 weights, g groups of a block, w weights of a group.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

K_QUANTS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


def pack(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """Weights `[.., K]` in float32, K a multiple of 256, to the bytes of their blocks `[.., bytes]`."""
    blocks_n = torch.from_numpy(weight).reshape(-1, 256)
    packed = _six_bits(blocks_n) if kind is Kind.Q6_K else _with_minima(blocks_n, {Kind.Q4_K: 4, Kind.Q5_K: 5}[kind])
    return packed.view(*weight.shape[:-1], -1).numpy()


def _with_minima(weight_n: Tensor, bits: int) -> Tensor:
    w_ngw, most = weight_n.view(-1, 8, 32), 2**bits - 1
    minimum_ng = -w_ngw.amin(2).clamp(max=0)
    d_n1, s_ng = _two_levels((w_ngw.amax(2) + minimum_ng) / most, 63)
    m_n1, t_ng = _two_levels(minimum_ng, 63)
    scale_ng1, minimum_ng1 = (d_n1.float() * s_ng)[..., None], (m_n1.float() * t_ng)[..., None]
    codes = ((w_ngw + minimum_ng1) / scale_ng1.clamp(min=1e-30)).round().clamp(0, most).to(torch.uint8)
    s, t = s_ng.to(torch.uint8), t_ng.to(torch.uint8)
    scales = (s[:, :4] | s[:, 4:] >> 4 << 6, t[:, :4] | t[:, 4:] >> 4 << 6, s[:, 4:] & 15 | t[:, 4:] << 4)
    fifth = _bits(codes >> 4, torch.arange(8)[:, None]) if bits == 5 else codes[:, 0, :0]
    low = codes.view(-1, 4, 2, 32) & 15
    halves = (low[:, :, 0] | low[:, :, 1] << 4).flatten(1)
    return torch.cat((d_n1.view(torch.uint8), m_n1.view(torch.uint8), *scales, fifth, halves), 1)


def _six_bits(weight_n: Tensor) -> Tensor:
    w_ngw = weight_n.view(-1, 16, 16)
    d_n1, s_ng = _two_levels(w_ngw.abs().amax(2) / 31, 127)
    scale_ng1 = (d_n1.float() * s_ng)[..., None]
    codes = ((w_ngw / scale_ng1.clamp(min=1e-30)).round().clamp(-32, 31) + 32).to(torch.uint8).view(-1, 2, 4, 32)
    low = (codes[:, :, :2] & 15 | codes[:, :, 2:] << 4).flatten(1)
    high = torch.stack([_bits(half >> 4, torch.arange(0, 8, 2)[:, None]) for half in codes.unbind(1)], 1).flatten(1)
    return torch.cat((low, high, s_ng.to(torch.uint8), d_n1.view(torch.uint8)), 1)


def _two_levels(numbers_ng: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A float16 for each block and integers up to `most`, whose products are near the numbers."""
    factor_n1 = (numbers_ng.amax(1, keepdim=True) / most).half()
    return factor_n1, (numbers_ng / factor_n1.float().clamp(min=1e-30)).round().clamp(0, most)


def _bits(parts: Tensor, shifts: Tensor) -> Tensor:
    """Some bits of each of the parts `[.., parts, n]` in one byte."""
    return (parts.int() << shifts).sum(-2).to(torch.uint8)
