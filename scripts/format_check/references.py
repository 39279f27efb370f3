"""Small matrices of every format, packed and dequantised by the library that defines it.

Shape suffixes: N outputs, K inputs, E experts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_runtime.config.quantization import METHODS
from moe_runtime.kernels.quantized import quantize
from moe_runtime.weights.compressed_writer import compressed
from moe_runtime.weights.compressed_writer import settings as written_settings

N, K, E = 48, 256, 3
LINEAR, FUSED = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts.down_proj"


@dataclass(frozen=True)
class Sample:
    """A matrix.

    Attributes:
        settings: its quantization_config.
        parts: its tensors, by what replaces `weight` in the plain name.
        weight: what the library gives, in the type in which it gives it: `[N, K]`, or `[E, N, K]`.
    """

    format: str
    settings: dict[str, Any]
    parts: dict[str, Tensor]
    weight: Tensor

    @property
    def name(self) -> str:
        return LINEAR if self.weight.ndim == 2 else FUSED


def compressed_tensors() -> Iterator[Sample]:
    """The library packs weights at random with scales of the largest weights."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    ints = [
        {"num_bits": bits, "type": "int", "symmetric": symmetric} | strategy
        for bits in (4, 8)
        for symmetric in (True, False)
        for strategy in ({"strategy": "group", "group_size": 32}, {"strategy": "channel"})
    ]
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    floats = [{"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "block", "block_structure": [16, 64]}]
    fp4 = {"num_bits": 4, "type": "float", "symmetric": True}
    nvfp4 = fp4 | {"strategy": "tensor_group", "group_size": 16}
    chosen = [("pack-quantized", args) for args in ints]
    chosen += [("float-quantized", fp8 | args) for args in floats]
    chosen += [("int-quantized", fp8 | {"type": "int", "strategy": "channel"})]
    chosen += [("nvfp4-pack-quantized", nvfp4)] * 20  # each has a divisor of its own
    chosen += [("mxfp4-pack-quantized", fp4 | {"strategy": "group", "group_size": 32})]
    for format, args in chosen:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        compressor = BaseCompressor.get_value_from_registry(format)
        packed = compressor.compress(_state(args), scheme)
        weight = compressor.decompress(dict(packed), scheme)["weight"]
        groups = {"group_0": scheme.model_dump(mode="json")}
        settings = {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}
        kind = f"{args['num_bits']} bits, {args['strategy']}{'' if args['symmetric'] else ', zeros'}"
        yield Sample(f"{format}, {kind}", settings, packed, weight)
    for method, held in METHODS.items():  # what the runtime writes, read by the library
        packed = compressed(quantize(torch.randn(N, K), held))
        settings = written_settings(held, [])
        scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
        weight = BaseCompressor.get_value_from_registry(settings["format"]).decompress(dict(packed), scheme)["weight"]
        yield Sample(f"{settings['format']}, `quantize --quantization {method}`", settings, packed, weight)


def _state(args: dict[str, Any]) -> dict[str, Tensor]:
    """Weights at random, and scales and zeros of the shapes that compressed-tensors wants."""
    weight = torch.randn(N, K, dtype=torch.bfloat16)
    rows, group = args.get("block_structure") or (1, args.get("group_size") or K)
    if args["strategy"] == "tensor":
        rows = N
    largest = weight.abs().float().view(N // rows, rows, K // group, group).amax(dim=(1, 3))
    top = {"int": 2.0 ** (args["num_bits"] - 1), "float": 448.0 if args["num_bits"] == 8 else 6.0}[args["type"]]
    state = {"weight": weight}
    if args["strategy"] == "tensor_group":
        state["weight_global_scale"] = (448 * 6 / largest.max()).view(1)
        largest = (largest * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    scale = (largest / top).to(torch.bfloat16)
    state["weight_scale"] = scale.flatten()[:1] if args["strategy"] == "tensor" else scale
    if not args["symmetric"]:
        state["weight_zero_point"] = torch.randint(-3, 4, scale.shape).to(torch.int8)
    return state


def modelopt() -> Iterator[Sample]:
    """The library quantises weights at random."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    weight = torch.randn(N, K)
    packed, scale, whole = NVFP4QTensor.quantize(weight, 16)
    found = packed.dequantize(dtype=torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
    parts = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": whole}
    yield Sample("NVFP4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, parts, found)
    for algorithm, axis in (("FP8", None), ("FP8_PER_CHANNEL_PER_TOKEN", 0)):
        packed, scale = FP8QTensor.quantize(weight, axis=axis)
        found = packed.dequantize(dtype=torch.float32, scale=scale)
        parts = {"weight": packed._quantized_data, "weight_scale": scale.float()}
        yield Sample(algorithm, {"quant_method": "modelopt", "quant_algo": algorithm}, parts, found)


def autoawq() -> Iterator[Sample]:
    """Words at random; any are valid."""
    packing = _module_of("awq", "utils/packing_utils.py")
    for group in (32, 128):
        words = [
            torch.randint(-(2**31), 2**31, shape, dtype=torch.int32) for shape in ((K, N // 8), (K // group, N // 8))
        ]
        scales = (torch.rand(K // group, N) * 0.01).half()
        weight = packing.dequantize_gemm(*words, scales, 4, group).T
        settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        yield Sample(
            f"gemm, groups of {group}", settings, {"qweight": words[0], "qzeros": words[1], "scales": scales}, weight
        )


def transformers() -> Iterator[Sample]:
    """What `FineGrainedFP8Config(dequantize=True)` and `Mxfp4Config(dequantize=True)` run, on random bytes."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for rows, group in ((16, 64), (16, 32)):
        codes = torch.randint(0, 127, (N, K)).byte() | torch.randint(0, 2, (N, K)).byte() << 7
        scale = torch.rand(N // rows, K // group) * 0.01
        parts = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scale}
        weight = Fp8Dequantize(None).convert(dict(parts))["weight"]
        settings = {"quant_method": "fp8", "weight_block_size": [rows, group]}
        yield Sample(f"fp8, blocks of {rows} x {group}", settings, parts, weight)
    blocks, scales = torch.randint(0, 256, (E, N, K // 32, 16)).byte(), torch.randint(100, 130, (E, N, K // 32)).byte()
    for dtype in (torch.bfloat16, torch.float32):
        weight = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
        yield Sample("mxfp4", {"quant_method": "mxfp4"}, {"weight_blocks": blocks, "weight_scales": scales}, weight)


def _module_of(package: str, file: str) -> ModuleType:
    """A file of a package that is not imported, because the package needs others."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"No module named {package!r}")
    path = Path(found.submodule_search_locations[0]) / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCES: dict[str, Callable[[], Iterator[Sample]]] = {
    "compressed-tensors": compressed_tensors,
    "nvidia-modelopt": modelopt,
    "autoawq": autoawq,
    "transformers": transformers,
}
