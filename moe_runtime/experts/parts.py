"""An expert's matrices and biases, and a checksum over a slot's content."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

# Gate and up are [intermediate, hidden], down is [hidden, intermediate]; a bias is a vector of its matrix's outputs.
ExpertPart = Literal["gate", "up", "down", "gate_bias", "up_bias", "down_bias"]

CHUNK_WORDS = 1 << 20


# Not in `WeightFormat`: a checksum needs torch, which that file must not import, and is the same sum in every format.
def checksum(tensors: Iterable[Tensor]) -> int:
    """A 64-bit sum over the bytes of contiguous tensors, each word weighted by its position, modulo 2**64.

    The weights are odd, so a change of any one word changes the sum. Works on any device, without copying to the host.
    """
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        words = tensor.flatten().view(torch.uint8)
        words = torch.nn.functional.pad(words, (0, -len(words) % 8)).view(torch.int64)
        total = total * 1000003 + len(words)
        for first in range(0, len(words), CHUNK_WORDS):
            part = words[first : first + CHUNK_WORDS]
            places = torch.arange(first, first + len(part), device=part.device)
            total += (part * (places * 0x1E3779B97F4A7C15 * 2 + 1)).sum().cpu()
    return int(total)
