"""Every format of quantised matrices against packers of the tests: codes and scales bit for bit, weights exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import ACT_ORDER, CASES, GPT_OSS, Case, Packed, mxfp4, part_name, write
from safetensors.torch import load_file
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix, decode_codes
from moe_runtime.models.quantization import read_scheme
from moe_runtime.types.weight_format import Code, Scale
from moe_runtime.weights.checked import CheckedWeights
from moe_runtime.weights.checkpoint import Checkpoint
from moe_runtime.weights.quantized import QuantizedCheckpoint

EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


def open_source(path: Path) -> QuantizedCheckpoint:
    scheme = read_scheme(path, json.loads((path / "config.json").read_text()))
    assert scheme is not None
    return QuantizedCheckpoint(Checkpoint(path), scheme)


def tensors_of(name: str, packed: Packed) -> dict[str, Tensor]:
    return {part_name(name, part): tensor for part, tensor in packed.parts.items()}


def made(path: Path, case: Case, shape: tuple[int, int]) -> tuple[QuantizedCheckpoint, str, Packed]:
    """A checkpoint with one matrix of a format, and the matrix."""
    name, packed = EXPERT.format(3, "down"), case.pack(*shape)
    return open_source(write(path, tensors_of(name, packed), case.settings)), name, packed


def rows_of(count: int) -> list[slice]:
    return [slice(None), slice(0, 1), slice(count // 3, count - 1), slice(count - 2, None), slice(5, 11)]


def check(found: QuantizedMatrix, packed: Packed, rows: slice, inputs: int) -> None:
    """Codes, scales, zeros and weights are those of the packer."""
    format = found.format
    assert torch.equal(decode_codes(format.code, found.codes, inputs), packed.codes[rows])
    assert torch.equal(found.scales_NG, packed.scales[rows].to(found.scales_NG.dtype))
    if packed.zeros is None:
        assert found.zeros_NG is None
    else:
        middle = 0 if format.code is Code.INT8 else 8
        assert found.zeros_NG is not None
        assert torch.equal(found.zeros_NG, ((packed.zeros[rows] + middle) % 256).byte())
    assert torch.equal(found.dequantize(), packed.weight[rows])
    assert all(part.is_contiguous() for part in found.parts if part is not None)


@pytest.mark.parametrize("label", CASES)
def test_codes_scales_and_weights(tmp_path: Path, label: str) -> None:
    case = CASES[label]
    name, scale, has_zero = case.label
    for number, shape in enumerate(case.shapes):
        source, matrix, packed = made(tmp_path / str(number), case, shape)
        format = source.format_of(matrix)
        assert format is not None
        assert (format.name, format.scale, format.has_zero) == (name, Scale[scale], has_zero)
        assert source.has(matrix) and not source.has(matrix.replace("down", "up"))
        for rows in rows_of(shape[0]):
            found = source.read_quantized(matrix, shape, rows=rows)
            assert found.format == format
            check(found, packed, rows, shape[1])
            assert torch.equal(source.read(matrix, shape, rows=rows), packed.weight[rows])
        checked = CheckedWeights(source)
        assert checked.format_of(matrix) == format
        check(checked.read_quantized(matrix, shape), packed, slice(None), shape[1])


@pytest.mark.parametrize("label", ACT_ORDER)
def test_act_order_is_only_read_dequantised(tmp_path: Path, label: str) -> None:
    shape = (24, 64)
    source, name, packed = made(tmp_path, ACT_ORDER[label], shape)
    assert source.format_of(name) is None and source.has(name)
    for rows in rows_of(shape[0]):
        assert torch.equal(source.read(name, shape, rows=rows), packed.weight[rows])


def test_groups_in_order_are_held_quantised_whatever_the_settings_say(tmp_path: Path) -> None:
    case = CASES["gptq int4"]
    settings = case.settings | {"desc_act": True}
    source, name, packed = made(tmp_path, Case(settings, case.pack, case.label), (24, 64))
    assert source.format_of(name) is not None
    check(source.read_quantized(name, (24, 64)), packed, slice(None), 64)


@pytest.mark.parametrize("inputs", [64, 48])
def test_experts_of_gpt_oss(tmp_path: Path, inputs: int) -> None:
    experts, outputs = 3, 24
    packed = [mxfp4(blocks=True)(outputs, inputs) for _ in range(experts)]
    parts = {part: torch.stack([one.parts[part] for one in packed]) for part in packed[0].parts}
    tensors = {part_name(FUSED, part): tensor for part, tensor in parts.items()}
    plain = {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, inputs).bfloat16()}
    source = open_source(write(tmp_path, tensors | plain, GPT_OSS))
    assert source.has(FUSED) and str(source.format_of(FUSED).scale) == "Scale.E8M0"  # type: ignore[union-attr]
    shape = (experts, outputs, inputs)
    for index, one in enumerate(packed):
        for rows in rows_of(outputs):
            before = source.bytes_read
            check(source.read_quantized(FUSED, shape, index, rows), one, rows, inputs)
            wanted = sum(tensor[rows].nbytes for tensor in one.parts.values())
            assert source.bytes_read - before == wanted, "rows of one expert"
        assert torch.equal(source.read(FUSED, shape, index), one.weight)
    [(name, tensor)] = plain.items()
    assert source.format_of(name) is None and torch.equal(source.read(name, (8, inputs)), tensor)


def test_only_the_rows_that_are_wanted_are_read(tmp_path: Path) -> None:
    shape = (300, 256)
    source, name, packed = made(tmp_path, CASES["fp8 blocks"], shape)
    source.read_quantized(name, shape, rows=slice(128, 256))
    assert source.bytes_read == 128 * 256 + 2 * 4, "128 rows and their row of scales"
    source, name, packed = made(tmp_path, CASES["awq"], (24, 64))
    for first in range(0, 24, 8):
        source.read_quantized(name, (24, 64), rows=slice(first, first + 8))
    assert source.bytes_read == sum(tensor.nbytes for tensor in packed.parts.values()), "once for all pieces"
    source.release_all()
    source.read_quantized(name, (24, 64), rows=slice(0, 8))
    assert source.bytes_read == 2 * sum(tensor.nbytes for tensor in packed.parts.values())


@pytest.mark.parametrize("label", ["compressed int4", "fp8 blocks", "modelopt nvfp4", "gptq int4"])
def test_matrices_that_were_left_as_they_are(tmp_path: Path, label: str) -> None:
    """Whether the configuration names them or not."""
    case, tensor = CASES[label], torch.randn(16, 48).bfloat16()
    name = EXPERT.format(0, "up")
    source = open_source(write(tmp_path, {name: tensor, "lm_head.weight": tensor.clone()}, case.settings))
    for left in (name, "lm_head.weight"):
        assert source.has(left) and source.format_of(left) is None
        assert torch.equal(source.read(left, (16, 48)), tensor)


def test_a_quantised_head_beside_a_vision_tower(tmp_path: Path) -> None:
    case = CASES["compressed int4"]
    packed = case.pack(16, 48)
    tensors = {"model.language_model.embed_tokens.weight": torch.randn(16, 48)} | tensors_of("lm_head.weight", packed)
    source = open_source(write(tmp_path, tensors, case.settings | {"ignore": []}))
    check(source.read_quantized("lm_head.weight", (16, 48)), packed, slice(None), 48)


DAMAGE: list[tuple[str, dict[str, Tensor | None], list[str]]] = [
    ("fp8 blocks", {"weight_scale_inv": None}, ["no tensor", "down_proj.weight_scale_inv"]),
    ("fp8 blocks", {"weight_scale_inv": torch.ones(2, 2)}, ["weight_scale_inv", "[2, 2]", "[1, 1]"]),
    ("fp8 blocks", {"weight": torch.zeros(24, 64, dtype=torch.uint8)}, ["down_proj.weight", "U8", "F8_E4M3"]),
    ("modelopt fp8 channels", {"weight_scale": torch.ones(23)}, ["weight_scale", "[23]", "[24, 1]"]),
    ("compressed int4", {"weight_scale": None}, ["no tensor", "down_proj.weight_scale"]),
    ("compressed int4", {"weight_packed": torch.zeros(24, 9, dtype=torch.int32)}, ["weight_packed", "[24, 9]"]),
    ("compressed int4, zeros", {"weight_zero_point": None}, ["no tensor", "weight_zero_point"]),
    ("compressed nvfp4", {"weight_global_scale": torch.ones(2)}, ["weight_global_scale", "[2]", "[1]"]),
    ("compressed nvfp4", {"weight_scale": torch.ones(24, 4)}, ["weight_scale", "F32", "F8_E4M3"]),
    ("modelopt nvfp4", {"weight_scale_2": None}, ["no tensor", "weight_scale_2"]),
    ("gptq int4", {"qzeros": torch.zeros(4, 3, dtype=torch.int32)}, ["qzeros", "zero 1", "sym", "8"]),
    ("gptq int4", {"scales": torch.ones(3, 24).half()}, ["scales", "[3, 24]", "[4, 24]"]),
    ("awq", {"qzeros": None}, ["no tensor", "qzeros"]),
]


@pytest.mark.parametrize(("label", "changes", "words"), DAMAGE)
def test_damage_is_named(tmp_path: Path, label: str, changes: dict[str, Tensor | None], words: list[str]) -> None:
    case, name, shape = CASES[label], EXPERT.format(3, "down"), (24, 64)
    parts: dict[str, Any] = case.pack(*shape).parts | changes
    packed = Packed({part: tensor for part, tensor in parts.items() if tensor is not None}, *[torch.empty(0)] * 3)
    source = open_source(write(tmp_path, tensors_of(name, packed), case.settings))
    with pytest.raises(ValueError) as error:
        source.format_of(name)
        source.read_quantized(name, shape)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("label", "part", "value", "what"),
    [
        ("fp8 blocks", "weight_scale_inv", torch.nan, "scales"),
        ("fp8 blocks", "weight", torch.nan, "codes"),
        ("mxfp8", "weight_scale_inv", torch.nan, "scales"),
        ("gptq int4, zeros", "scales", -torch.inf, "scales"),
        ("compressed nvfp4", "weight_scale", torch.nan, "scales"),
        ("compressed nvfp4", "weight_global_scale", 0.0, "factors"),
        ("modelopt nvfp4", "weight_scale_2", torch.inf, "factors"),
    ],
)
def test_what_is_not_finite_is_found_when_weights_are_checked(
    tmp_path: Path, label: str, part: str, value: float, what: str
) -> None:
    source, name, _ = made(tmp_path, CASES[label], (24, 64))
    tensors = load_file(tmp_path / "model.safetensors")
    damaged = tensors[part_name(name, part)]
    if damaged.element_size() == 1:
        damaged.view(torch.uint8).flatten()[-1] = 255  # NaN in E8M0 and E4M3
    else:
        damaged.view(-1)[-1] = value
    source = open_source(write(tmp_path, tensors, CASES[label].settings))
    source.read_quantized(name, (24, 64))
    with pytest.raises(ValueError, match=rf"^model: tensor '{name}' is damaged: \d+ of \d+ {what} read are NaN"):
        CheckedWeights(source).read_quantized(name, (24, 64))
