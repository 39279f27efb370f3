"""Blocks of GGUF files: codes, scales and weights as the `gguf` package has them, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from moe_runtime.kernels.quantized import decode_codes
from moe_runtime.weights.formats.gguf import PLAIN_DTYPES, quantized, values
from moe_runtime.weights.gguf_file import FORMATS, READABLE

# Types that are only dequantised: where a block has its float16 numbers.
DEQUANTISED = {"Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(kind: Kind, rows: int, inputs: int) -> np.ndarray:
    """Rows of a type with random codes and scales, `[rows, bytes]`."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = torch.randint(0, 256, (rows, inputs // block, nbytes), dtype=torch.uint8)
    if kind is Kind.MXFP4:
        raw[..., 0] = torch.randint(90, 160, raw.shape[:-1], dtype=torch.uint8)
    for start in DEQUANTISED.get(kind.name, (0,) if kind is not Kind.MXFP4 else ()):
        numbers = torch.randn(*raw.shape[:-1], 1).half()
        raw[..., start : start + 2] = numbers.view(torch.uint8)
    return raw.flatten(1).numpy()


@pytest.mark.parametrize("name", [*FORMATS, *DEQUANTISED])
def test_weights_are_those_of_the_reference(name: str) -> None:
    kind, inputs = Kind[name], 768
    raw = random_blocks(kind, 5, inputs)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    found = values(name, torch.from_numpy(raw), inputs)
    assert found.dtype == torch.float32 and expected.abs().max() > 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_scales_are_those_of_the_file(name: str) -> None:
    """Against the blocks taken apart one by one."""
    kind, inputs = Kind[name], 96
    raw = random_blocks(kind, 4, inputs)
    found = quantized(name, torch.from_numpy(raw), inputs)
    assert found.format == FORMATS[name] and found.zeros_NG is None and found.factor_N is None
    codes, nbytes = decode_codes(found.format.code, found.codes, inputs), raw.shape[1] // 3
    for row in range(4):
        for group in range(3):
            block = raw[row, group * nbytes : (group + 1) * nbytes]
            scale = block[:1] if kind is Kind.MXFP4 else block[:2].view(np.float16)
            rest = block[len(block) - (32 if kind is Kind.Q8_0 else 16) :]
            fifth = int.from_bytes(block[2:6].tobytes(), "little")
            halves = [byte & 15 for byte in rest.tolist()] + [byte >> 4 for byte in rest.tolist()]
            expected = {
                Kind.Q8_0: rest.view(np.int8).tolist(),
                Kind.Q5_0: [half + 16 * (fifth >> weight & 1) - 16 for weight, half in enumerate(halves)],
                Kind.Q4_0: [half - 8.0 for half in halves],
                Kind.MXFP4: [[0, 0.5, 1, 1.5, 2, 3, 4, 6][half & 7] * (-1) ** (half >> 3) for half in halves],
            }[kind]
            assert found.scales_NG[row, group].item() == scale.item()
            assert codes[row, 32 * group : 32 * (group + 1)].tolist() == expected


@pytest.mark.parametrize("name", FORMATS)
def test_quantising_and_reading_is_near(name: str) -> None:
    weight = torch.randn(6, 64)
    raw = gguf.quants.quantize(weight.numpy(), Kind[name])
    error = (quantized(name, torch.from_numpy(raw), 64).dequantize() - weight).abs().mean()
    assert 0 < error < {"Q8_0": 0.02, "Q5_0": 0.1, "Q4_0": 0.2, "MXFP4": 0.2}[name]


def test_every_readable_type_is_read() -> None:
    assert set(READABLE) == {*FORMATS, *PLAIN_DTYPES, *DEQUANTISED}
