"""Quantised matrices as checkpoints store them, packed number by number, and what they stand for.

Every packer takes integers and scales at random, and computes the weights by the format's formula, one by one or in
float64 where that is exact; none of it uses the package.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Packed:
    """A matrix.

    Attributes:
        parts: its tensors, by what stands for "weight" in a name.
        weight: float32 `[N, K]`.
        codes: whole numbers or floats `[N, K]` that the codes stand for.
        scales, zeros: `[N, G]`, in the type of the file, and numbers that are subtracted from the codes.
    """

    parts: dict[str, Tensor]
    weight: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


Packer = Callable[[int, int], Packed]


@dataclass(frozen=True)
class Case:
    """A format.

    Attributes:
        settings: the quantization_config.
        pack: makes a matrix of outputs and inputs.
        label: name, type of scales and zeros of the expected `WeightFormat`.
        shapes: outputs and inputs to try.
    """

    settings: dict[str, Any]
    pack: Packer
    label: tuple[str, str, bool]
    shapes: tuple[tuple[int, int], ...] = ((24, 64), (40, 48))


def ceil_div(number: int, by: int) -> int:
    return -(-number // by)


def integers(low: int, high: int, *shape: int) -> Tensor:
    """At random from `low` to `high`, both included."""
    return torch.randint(low, high + 1, shape)


def scales_like(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape) * 0.02 + 0.004).to(dtype)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """int32 `[R, ceil(C * bits / 32)]` of numbers from 0, low bits first."""
    rows = []
    for row in values.tolist():
        words = [0] * ceil_div(len(row) * bits, 32)
        for place, value in enumerate(row):
            words[place * bits // 32] |= value << (place * bits % 32)
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def pack_nibbles(values: Tensor) -> Tensor:
    """Bytes of pairs of numbers from 0 to 15, the first in the low half."""
    rows = [[*row, 0] if len(row) % 2 else row for row in values.tolist()]
    return torch.tensor([[a | b << 4 for a, b in zip(row[::2], row[1::2], strict=True)] for row in rows]).byte()


def e4m3(byte: int) -> float:
    """OCP's 8-bit floating point specification, table 1: 4 bits of exponent with the bias 7, 3 of mantissa."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte >> 7 else size


def e2m1(nibble: int) -> float:
    return -E2M1[nibble & 7] if nibble & 8 else E2M1[nibble]


def mapped(function: Callable[[int], float], values: Tensor) -> Tensor:
    return torch.tensor([[function(value) for value in row] for row in values.tolist()])


def fp8_codes(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Bytes at random, without NaN, and what they stand for."""
    bytes_NK = integers(0, 255, outputs, inputs)
    bytes_NK[bytes_NK & 127 == 127] = 3
    return bytes_NK.byte(), mapped(e4m3, bytes_NK)


def spread(scales: Tensor, group: int, inputs: int) -> Tensor:
    """The scale of each input `[N, K]`."""
    return torch.stack([scales[:, k // group] for k in range(inputs)], dim=1)


def fp8_blocks(rows: int, group: int, part: str = "weight_scale_inv", dtype: torch.dtype = torch.float32) -> Packer:
    def pack(outputs: int, inputs: int) -> Packed:
        codes, values = fp8_codes(outputs, inputs)
        grid = scales_like(ceil_div(outputs, rows), ceil_div(inputs, group), dtype=dtype)
        scales = torch.stack([grid[n // rows] for n in range(outputs)]).float()
        parts = {"weight": codes.view(torch.float8_e4m3fn), part: grid}
        return Packed(parts, values * spread(scales, group, inputs), values, scales)

    return pack


def fp8_rows(shape: str, part: str = "weight_scale", dtype: torch.dtype = torch.float32) -> Packer:
    def pack(outputs: int, inputs: int) -> Packed:
        codes, values = fp8_codes(outputs, inputs)
        shapes = {"number": (), "tensor": (1,), "output": (outputs,), "channel": (outputs, 1)}
        stored = scales_like(*shapes[shape], dtype=dtype)
        scales = stored.float().reshape(-1, 1).expand(outputs, 1)
        parts = {"weight": codes.view(torch.float8_e4m3fn), part: stored}
        return Packed(parts, values * scales, values, scales)

    return pack


def int8_channel(outputs: int, inputs: int) -> Packed:
    values = integers(-128, 127, outputs, inputs)
    stored = scales_like(outputs, 1, dtype=torch.bfloat16)
    parts = {"weight": values.to(torch.int8), "weight_scale": stored}
    return Packed(parts, values * stored.float(), values.float(), stored.float())


def mxfp8(outputs: int, inputs: int) -> Packed:
    codes, values = fp8_codes(outputs, inputs)
    scales = integers(110, 122, outputs, ceil_div(inputs, 32)).byte()
    parts = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scales}
    return Packed(parts, values * spread(2.0 ** (scales.double() - 127), 32, inputs).float(), values, scales)


def mxfp4(blocks: bool) -> Packer:
    def pack(outputs: int, inputs: int) -> Packed:
        groups = ceil_div(inputs, 32)
        nibbles = integers(0, 15, outputs, groups * 32 if blocks else inputs)
        scales = integers(112, 124, outputs, groups).byte()
        values = mapped(e2m1, nibbles)[:, :inputs]
        packed = pack_nibbles(nibbles)
        parts = {"weight_packed": packed, "weight_scale": scales}
        if blocks:
            parts = {"weight_blocks": packed.view(outputs, groups, 16), "weight_scales": scales}
        return Packed(parts, values * spread(2.0 ** (scales.double() - 127), 32, inputs).float(), values, scales)

    return pack


def nvfp4(divides: bool) -> Packer:
    def pack(outputs: int, inputs: int) -> Packed:
        nibbles = integers(0, 15, outputs, inputs)
        scales = integers(1, 126, outputs, ceil_div(inputs, 16)).byte()
        whole = torch.rand(1) * 1000 + 500 if divides else torch.rand(()) / 1000
        values, floats = mapped(e2m1, nibbles), mapped(e4m3, scales)
        product = floats / whole if divides else floats * whole
        packed, stored = pack_nibbles(nibbles), scales.view(torch.float8_e4m3fn)
        parts = {"weight": packed, "weight_scale": stored, "weight_scale_2": whole, "input_scale": torch.rand(())}
        if divides:
            parts = {"weight_packed": packed, "weight_scale": stored, "weight_global_scale": whole}
        return Packed(parts, values * spread(product, 16, inputs), values, stored)

    return pack


def packed_integers(bits: int, group: int | None, symmetric: bool, dtype: torch.dtype = torch.bfloat16) -> Packer:
    """`pack-quantized` of compressed-tensors."""

    def pack(outputs: int, inputs: int) -> Packed:
        of_group, half = group or inputs, 1 << bits - 1
        groups = ceil_div(inputs, of_group)
        values = integers(-half, half - 1, outputs, inputs)
        scales = scales_like(outputs, groups, dtype=dtype)
        parts = {"weight_packed": pack_words(values + half, bits), "weight_scale": scales}
        parts["weight_shape"] = torch.tensor([outputs, inputs])
        zeros = None
        if not symmetric:
            zeros = integers(-half, half - 1, outputs, groups)
            parts["weight_zero_point"] = pack_words((zeros + half).T, bits).T.contiguous()
        less = 0 if zeros is None else spread(zeros, of_group, inputs)
        weight = (values - less) * spread(scales.float(), of_group, inputs)
        return Packed(parts, weight, values.float(), scales, zeros)

    return pack


def gptq(bits: int, group: int | None, sym: bool, version: int = 1, act_order: bool = False) -> Packer:
    def pack(outputs: int, inputs: int) -> Packed:
        of_group, half, top = group or inputs, 1 << bits - 1, (1 << bits) - 1
        groups = ceil_div(inputs, of_group)
        group_of = [k // of_group for k in range(inputs)]
        if act_order:
            random.shuffle(group_of)
        values = integers(0, top, outputs, inputs)
        zeros = torch.full((outputs, groups), half) if sym else integers(0, top, outputs, groups)
        scales = scales_like(outputs, groups, dtype=torch.float16)
        parts = {
            "qweight": pack_words(values, bits).T.contiguous(),
            "qzeros": pack_words((zeros - int(version == 1)).T % (top + 1), bits),
            "scales": scales.T.contiguous(),
            "g_idx": torch.tensor(group_of, dtype=torch.int32),
        }
        weight = (values - zeros[:, group_of]) * scales[:, group_of].float()
        return Packed(parts, weight, (values - half).float(), scales, None if sym else zeros - half)

    return pack


def awq(group: int | None) -> Packer:
    def pack(outputs: int, inputs: int) -> Packed:
        of_group = group or inputs
        groups = ceil_div(inputs, of_group)
        values, zeros = integers(0, 15, outputs, inputs), integers(0, 15, outputs, groups)
        scales = scales_like(outputs, groups, dtype=torch.float16)
        order = [word + place for word in range(0, outputs, 8) for place in AWQ_ORDER]
        parts = {
            "qweight": pack_words(values.T[:, order], 4),
            "qzeros": pack_words(zeros.T[:, order], 4),
            "scales": scales.T.contiguous(),
        }
        weight = (values - spread(zeros, of_group, inputs)) * spread(scales.float(), of_group, inputs)
        return Packed(parts, weight, (values - 8).float(), scales, zeros - 8)

    return pack


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    """Settings of compressed-tensors for all linear modules."""
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True} | weights}},
    }


def of_gptq(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True} | settings


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
RAGGED = ((24, 64), (128, 128), (300, 200), (130, 257))
MODELOPT = {"quant_method": "modelopt", "ignore": ["lm_head"]}
CASES = {
    "fp8 blocks": Case(BLOCKS, fp8_blocks(128, 128), ("fp8 g128", "FLOAT32", False), RAGGED),
    "fp8 blocks, bfloat16": Case(
        BLOCKS | {"weight_block_size": [64, 32]},
        fp8_blocks(64, 32, dtype=torch.bfloat16),
        ("fp8 g32", "FLOAT32", False),
        RAGGED,
    ),
    "fp8 of a tensor": Case(
        BLOCKS | {"weight_block_size": None}, fp8_rows("number", "weight_scale_inv"), ("fp8", "FLOAT32", False)
    ),
    "fp8 with weight_scale": Case(
        {"quant_method": "fp8", "activation_scheme": "static"}, fp8_rows("tensor"), ("fp8", "FLOAT32", False)
    ),
    "mxfp8": Case(BLOCKS | {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, mxfp8, ("fp8 g32", "E8M0", False)),
    "mxfp8 as a method": Case({"quant_method": "mxfp8", "ignored_layers": []}, mxfp8, ("fp8 g32", "E8M0", False)),
    "compressed int4": Case(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=16),
        packed_integers(4, 16, symmetric=True),
        ("int4 g16", "BFLOAT16", False),
        ((24, 64), (7, 40), (13, 45)),
    ),
    "compressed int4, zeros": Case(
        compressed("pack-quantized", num_bits=4, group_size=8, symmetric=False),
        packed_integers(4, 8, symmetric=False, dtype=torch.float32),
        ("int4 g8", "FLOAT32", True),
        ((24, 64), (7, 40), (13, 45)),
    ),
    "compressed int8 channels": Case(
        compressed("pack-quantized", num_bits=8, strategy="channel"),
        packed_integers(8, None, symmetric=True, dtype=torch.float16),
        ("int8", "FLOAT16", False),
        ((24, 64), (7, 40), (13, 45)),
    ),
    "compressed int8, zeros": Case(
        compressed("pack-quantized", num_bits=8, strategy="group", group_size=32, symmetric=False),
        packed_integers(8, 32, symmetric=False),
        ("int8 g32", "BFLOAT16", True),
        ((24, 64), (7, 40), (13, 45)),
    ),
    "compressed fp8 of a tensor": Case(
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        fp8_rows("tensor", dtype=torch.bfloat16),
        ("fp8", "FLOAT32", False),
    ),
    "compressed fp8 channels": Case(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        fp8_rows("channel", dtype=torch.bfloat16),
        ("fp8", "FLOAT32", False),
    ),
    "compressed fp8 blocks": Case(
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        fp8_blocks(128, 128, "weight_scale", torch.bfloat16),
        ("fp8 g128", "FLOAT32", False),
        RAGGED,
    ),
    "compressed int8 bytes": Case(
        compressed("int-quantized", num_bits=8, strategy="channel"), int8_channel, ("int8", "FLOAT32", False)
    ),
    "compressed mxfp4": Case(
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        mxfp4(blocks=False),
        ("fp4 g32", "E8M0", False),
    ),
    "compressed nvfp4": Case(
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4(divides=True),
        ("fp4 g16", "E4M3", False),
        ((24, 64), (40, 48), (33, 56)),
    ),
    "modelopt nvfp4": Case(
        MODELOPT | {"quant_algo": "NVFP4"}, nvfp4(divides=False), ("fp4 g16", "E4M3", False), ((24, 64), (33, 56))
    ),
    "modelopt fp8": Case(MODELOPT | {"quant_algo": "FP8"}, fp8_rows("number"), ("fp8", "FLOAT32", False)),
    "modelopt fp8 channels": Case(
        MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, fp8_rows("output"), ("fp8", "FLOAT32", False)
    ),
    "gptq int4": Case(of_gptq(), gptq(4, 16, sym=True), ("int4 g16", "FLOAT16", False)),
    "gptq int4, zeros": Case(of_gptq(sym=False), gptq(4, 16, sym=False), ("int4 g16", "FLOAT16", True)),
    "gptq int4, v2": Case(
        of_gptq(sym=False, checkpoint_format="gptq_v2"),
        gptq(4, 16, sym=False, version=2),
        ("int4 g16", "FLOAT16", True),
    ),
    "gptq int8, zeros": Case(
        of_gptq(bits=8, group_size=32, sym=False), gptq(8, 32, sym=False), ("int8 g32", "FLOAT16", True)
    ),
    "gptq int8 channels": Case(
        of_gptq(bits=8, group_size=-1, desc_act=True), gptq(8, None, sym=True), ("int8", "FLOAT16", False)
    ),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
        awq(16),
        ("int4 g16", "FLOAT16", True),
    ),
    "awq channels": Case(
        {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "GEMM"},
        awq(None),
        ("int4", "FLOAT16", True),
    ),
}
ACT_ORDER = {
    "int4": Case(of_gptq(desc_act=True), gptq(4, 16, sym=True, act_order=True), ("", "", False)),
    "int8, zeros": Case(
        of_gptq(bits=8, desc_act=True, sym=False), gptq(8, 16, sym=False, act_order=True), ("", "", False)
    ),
}
GPT_OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}


def part_name(name: str, part: str) -> str:
    """The name of a part of `a.weight` or `a.experts.down_proj`."""
    if name.endswith(".weight"):
        return name.removesuffix("weight") + part
    return name + part.removeprefix("weight")


def write(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = None) -> Path:
    """A folder with tensors, and a `config.json` with the settings."""
    path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path / "model.safetensors"))
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": settings}))
    return path
