"""Blocks of GGUF files: codes, scales and weights as the `gguf` package has them, bit for bit."""

from __future__ import annotations

import gguf
import k_quants
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from moe_runtime.kernels.quantized import decode_codes
from moe_runtime.weights.formats.gguf import PLAIN_DTYPES, quantized, values
from moe_runtime.weights.gguf_file import FORMATS, READABLE

# Where a block has its float16 numbers, if it has more than its first.
NUMBERS = {"MXFP4": (), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
PLAIN = ("Q8_0", "Q5_0", "Q4_0", "MXFP4")  # of which a block has a scale and codes


def random_blocks(kind: Kind, rows: int, inputs: int) -> np.ndarray:
    """Rows of a type with random codes and scales, `[rows, bytes]`."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = torch.randint(0, 256, (rows, inputs // block, nbytes), dtype=torch.uint8)
    if kind is Kind.MXFP4:
        raw[..., 0] = torch.randint(90, 160, raw.shape[:-1], dtype=torch.uint8)
    for start in NUMBERS.get(kind.name, (0,)):
        numbers = torch.randn(*raw.shape[:-1], 1).half()
        raw[..., start : start + 2] = numbers.view(torch.uint8)
    return raw.flatten(1).numpy()


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_reference(name: str) -> None:
    kind, inputs = Kind[name], 768
    raw = random_blocks(kind, 5, inputs)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    found = values(name, torch.from_numpy(raw), inputs)
    assert found.dtype == torch.float32 and expected.abs().max() > 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", PLAIN)
def test_codes_and_scales_are_those_of_the_file(name: str) -> None:
    """Against the blocks taken apart one by one."""
    kind, inputs = Kind[name], 96
    raw = random_blocks(kind, 4, inputs)
    found = quantized(name, torch.from_numpy(raw), inputs)
    assert found.format == FORMATS[name] and found.zeros_NG is None and found.factor_NS is None
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


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_scales_and_offsets_are_those_of_the_file(name: str) -> None:
    kind, rows, blocks = Kind[name], 3, 2
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = random_blocks(kind, rows, size * blocks)
    found = quantized(name, torch.from_numpy(raw), size * blocks)
    assert found.format == FORMATS[name] and found.zeros_NG is None
    for row, block in np.ndindex(rows, blocks):
        own = raw[row, block * nbytes : (block + 1) * nbytes]
        numbers = [own[start : start + 2].view(np.float16)[0] for start in NUMBERS[name]]
        groups = slice(block * size // found.format.group, (block + 1) * size // found.format.group)
        scales = found.scales_NG[row, groups].tolist()
        offsets = None if found.offsets_NG is None else found.offsets_NG[row, groups].tolist()
        if name in ("Q4_1", "Q5_1"):
            assert (scales, offsets) == ([numbers[0]], [numbers[1]]) and found.factor_NS is None
            continue
        assert found.factor_NS is not None and found.factor_NS[row, block].item() == numbers[0]
        if name == "Q6_K":
            assert scales == own[192:208].view(np.int8).tolist() and offsets is None
        else:
            (s,), (t,) = gguf.quants.Q4_K.get_scale_min(own[None, 4:16])
            assert (scales, offsets) == (s.tolist(), t.tolist())
            assert found.offset_factor_NS is not None and found.offset_factor_NS[row, block].item() == -numbers[1]
    values = decode_codes(found.format.code, found.codes, size * blocks)
    lowest, highest = {"Q4_1": (0, 15), "Q4_K": (0, 15), "Q6_K": (-32, 31)}.get(name, (0, 31))
    assert lowest <= values.min() and values.max() <= highest and values.unique().numel() > 8


@pytest.mark.parametrize("name", FORMATS)
def test_quantising_and_reading_is_near(name: str) -> None:
    weight, kind = torch.randn(6, 512), Kind[name]
    raw = (k_quants.pack if kind in k_quants.K_QUANTS else gguf.quants.quantize)(weight.numpy(), kind)
    error = (quantized(name, torch.from_numpy(raw), 512).dequantize() - weight).abs().mean()
    assert 0 < error < {"8": 0.02, "6": 0.03, "5": 0.06}.get(name[1], 0.2)


def test_every_readable_type_is_read() -> None:
    assert set(READABLE) == {*FORMATS, *PLAIN_DTYPES}
