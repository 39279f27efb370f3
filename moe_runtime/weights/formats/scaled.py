"""Codes of 8 bits with scales of the matrix, of each output, or of blocks.

- FP8 in blocks, of DeepSeek (arXiv:2412.19437, section 3.3) and Qwen: a scale for 128 outputs and 128 inputs; blocks at
  the edges are smaller. weight = code * `weight_scale_inv`.
- `float-quantized` and `int-quantized` of compressed-tensors, FP8 of ModelOpt: weight = code * `weight_scale`.
- MXFP8: a scale of type E8M0 for each 32 inputs of an output.
"""

from __future__ import annotations

import torch

from moe_runtime.kernels.quantized import QuantizedMatrix, decode_scales
from moe_runtime.types.weight_format import Code, Scale
from moe_runtime.weights.checkpoint import READABLE
from moe_runtime.weights.formats.stored import E4M3, E8M0, StoredRows
from moe_runtime.weights.scheme import Storage

CODES = {Code.FP8: E4M3, Code.INT8: {"I8": torch.int8}}
OTHER_NAME = "weight_scale"  # of scales, in files whose configuration does not tell


def read_scaled(rows: StoredRows, storage: Storage) -> QuantizedMatrix:
    """Rows of a matrix. Float scales of any type become float32, which is exact."""
    format, inputs = storage.format, rows.num_inputs
    codes = rows.read(storage.codes, CODES[format.code], rows.num_outputs, inputs).view(torch.uint8)
    part = OTHER_NAME if not rows.has(storage.scales) and rows.has(OTHER_NAME) else storage.scales
    is_mx = format.scale is Scale.E8M0
    scales_NG = rows.read_scales(part, E8M0 if is_mx else READABLE | E8M0, format, storage.block_rows)
    return QuantizedMatrix(format, codes, scales_NG if is_mx else decode_scales(scales_NG), None, None, inputs)
