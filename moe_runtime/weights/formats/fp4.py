"""Codes of the type E2M1, two in a byte, the even input in the low half; `QuantizedMatrix` has them so too.

- MXFP4: weight = code * 2^(scale - 127) for 32 inputs. gpt-oss cuts the rows of its tensors into blocks of 16 bytes.
- NVFP4: 16 inputs share a scale of type E4M3. ModelOpt multiplies it by `weight_scale_2`, compressed-tensors divides
  it by `weight_global_scale`, both in float32.
"""

from __future__ import annotations

import torch

from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.weights.formats.stored import BYTES, E4M3, E8M0, StoredRows
from moe_runtime.weights.scheme import Layout, Storage

BLOCK_BYTES = 16


def read_mxfp4(rows: StoredRows, storage: Storage) -> QuantizedMatrix:
    """Rows of a matrix of gpt-oss or compressed-tensors."""
    outputs, inputs = rows.num_outputs, rows.num_inputs
    width = -(-inputs // 2)
    if storage.layout is Layout.MXFP4_BLOCKS:
        groups = storage.format.num_groups(inputs)
        codes = rows.read(storage.codes, BYTES, outputs, groups, BLOCK_BYTES).flatten(1)[:, :width].contiguous()
    else:
        codes = rows.read(storage.codes, BYTES, outputs, width)
    scales_NG = rows.read_scales(storage.scales, E8M0, storage.format)
    return QuantizedMatrix(storage.format, codes, scales_NG, None, None, inputs)


def read_nvfp4(rows: StoredRows, storage: Storage) -> QuantizedMatrix:
    """Rows of a matrix of ModelOpt or compressed-tensors.

    The reciprocal of a global scale needs float64. The product with a scale is then that of the division: a quotient of
    4 by 24 bits is at least 2^-49 of itself away from where float32 rounds up or down.
    """
    outputs, inputs = rows.num_outputs, rows.num_inputs
    codes = rows.read(storage.codes, BYTES, outputs, -(-inputs // 2))
    scales_NG = rows.read_scales(storage.scales, E4M3, storage.format)
    if storage.layout is Layout.NVFP4:
        factor_N1 = torch.full((len(codes), 1), rows.read_number("weight_scale_2"), dtype=torch.float32)
    else:
        whole = torch.full((len(codes), 1), rows.read_number("weight_global_scale"), dtype=torch.float64)
        factor_N1 = whole.reciprocal()
    return QuantizedMatrix(storage.format, codes, scales_NG, None, factor_N1, inputs)
