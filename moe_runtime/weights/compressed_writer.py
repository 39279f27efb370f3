"""Writes quantised matrices as compressed-tensors does, and the settings that describe them.

Shape suffixes: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.types.weight_format import Code, Scale, WeightFormat
from moe_runtime.weights.checkpoint import INDEX

MOST_SHARD_BYTES = 4 << 30
FORMATS = {
    Code.INT4: "pack-quantized",
    Code.INT8: "pack-quantized",
    Code.FP8: "float-quantized",
    Code.FP4: "mxfp4-pack-quantized",
}


def compressed(matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """The tensors of a matrix, by the end of their names."""
    code, (outputs, inputs) = matrix.format.code, (len(matrix), matrix.num_inputs)
    assert not matrix.format.has_zero and (code is not Code.FP4 or matrix.format.scale is Scale.E8M0)
    if code is Code.FP8:
        return {"weight": matrix.codes.view(torch.float8_e4m3fn), "weight_scale": matrix.scales_NG}
    if code is Code.FP4:
        return {"weight_packed": matrix.codes, "weight_scale": matrix.scales_NG}
    codes = matrix.codes if code is Code.INT4 else matrix.codes ^ 128  # counted from the lowest
    words = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)).contiguous().view(torch.int32)
    return {
        "weight_packed": words,
        "weight_scale": matrix.scales_NG,
        "weight_shape": torch.tensor([outputs, inputs]),
    }


def settings(format: WeightFormat, ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose linear maps are all in one format, but for those in `ignore`."""
    weights = {
        "num_bits": format.code.bits,
        "type": "int" if format.code in (Code.INT4, Code.INT8) else "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": format.group,
        "dynamic": False,
    }
    kind = FORMATS[format.code]
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": kind}},
        "ignore": list(ignore),
    }


class ShardWriter:
    """Writes tensors into safetensors files of at most 4 GiB and an index, in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard: dict[str, Tensor] = {}
        self._nbytes = 0
        self._files: list[tuple[Path, list[str]]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; a full file is written at once."""
        if self._nbytes and self._nbytes + tensor.nbytes > MOST_SHARD_BYTES:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._nbytes += tensor.nbytes
        self.total += tensor.nbytes

    def close(self) -> None:
        """Write the rest and the index."""
        self._flush()
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self._files, start=1):
            final = f"model-{number:05}-of-{len(self._files):05}.safetensors"
            file.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        content = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(content, indent=1) + "\n")

    def _flush(self) -> None:
        file = self._folder / f"part-{len(self._files)}.safetensors"
        save_file(self._shard, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes files private
        self._files.append((file, list(self._shard)))
        self._shard, self._nbytes = {}, 0
