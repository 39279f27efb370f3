"""The batch-invariant forms of the ops whose usual forms are not batch-invariant. A row's result is the same, bit for
bit, alone or in any batch, and for any cut of a prompt into chunks.

Signatures and meanings are those of `moe_runtime.kernels.ops` and `torch.nn.functional.linear`. On CUDA a product has
one tile per dtype, for any number of rows, and every row uses decode attention. Elsewhere these are the slow twins,
which compute each row by itself. All other ops of `ops` are already batch-invariant.

Shape suffixes: as in `torch_ops` and `torch_attention`; I and O input and output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_runtime.kernels import ops, torch_attention, torch_ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.kv_rows import KVScales
from moe_runtime.kernels.quantized_slots import Matrix, MatrixSlots, dense
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU


def linear(x_NI: Tensor, weight_OI: Matrix, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, rounded once, `[N, O]`; a quantised weight is taken as in `ops.quantized_linear`."""
    if ops.uses_triton(x_NI.device):
        from moe_runtime.kernels.triton import dense_gemm

        return dense_gemm.linear(x_NI, weight_OI, bias_O)
    weight_OI = dense(weight_OI, x_NI.dtype)
    out_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
    for row, x_I in enumerate(x_NI):
        out_NO[row] = F.linear(x_I, weight_OI, bias_O)
    return out_NO


def head_products(x_THI: Tensor, weight_HOI: Tensor) -> Tensor:
    """`x @ weight.T` of each head, `[T, H, O]`; see `torch_ops.head_products`."""
    return torch.stack(
        [linear(x_THI[:, head].contiguous(), weight_OI) for head, weight_OI in enumerate(weight_HOI)], dim=1
    )


def grouped_mlp(
    x_ND: Tensor,
    row_R: Tensor | None,
    counts_S: Tensor,
    w13_SGD: MatrixSlots,
    w2_SDF: MatrixSlots,
    *,
    b13_SG: Tensor | None = None,
    b2_SD: Tensor | None = None,
    swiglu: SwiGLU = PLAIN,
) -> Tensor:
    """SwiGLU experts over rows grouped by slot, `[R, D]` in the grouped order; see `torch_ops.grouped_mlp`."""
    if ops.uses_triton(x_ND.device):
        from moe_runtime.kernels.triton import grouped_gemm, tiles

        tile = tiles.invariant_tile(x_ND.dtype)
        return grouped_gemm.grouped_mlp(
            x_ND, row_R, counts_S, w13_SGD, w2_SDF, b13_SG=b13_SG, b2_SD=b2_SD, swiglu=swiglu, tile=tile
        )
    rows_RD = x_ND if row_R is None else x_ND[row_R]
    out_RD = torch.empty_like(rows_RD)
    one = counts_S.new_ones(1)
    first = 0
    for slot, count in enumerate(counts_S.tolist()):
        if not count:
            continue
        w13_1GD, w2_1DF = (dense(w[slot], x_ND.dtype)[None] for w in (w13_SGD, w2_SDF))
        b13_1G, b2_1D = (None if bias is None else bias[slot][None] for bias in (b13_SG, b2_SD))
        for row in range(first, first + count):
            row_1D = rows_RD[row : row + 1]
            out_RD[row] = torch_ops.grouped_mlp(
                row_1D, None, one, w13_1GD, w2_1DF, b13_SG=b13_1G, b2_SD=b2_1D, swiglu=swiglu
            )[0]
        first += count
    return out_RD


def paged_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGe: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    sinks_H: Tensor | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """Causal attention over the cached keys of each row's sequence; see `torch_attention.paged_attention`."""
    options: dict[str, Any] = {
        "scale": scale,
        "sliding_window": sliding_window,
        "sinks_H": sinks_H,
        "kv_scales": kv_scales,
    }
    if ops.uses_triton(q_THd.device):
        from moe_runtime.kernels.triton import attention

        return attention.invariant_paged_attention(q_THd, k_cache_NBGd, v_cache_NBGe, meta, **options)
    out_THe = q_THd.new_empty(*q_THd.shape[:2], v_cache_NBGe.shape[3])
    for row, (sequence, position) in enumerate(zip(*_rows(meta), strict=True)):
        table = meta.page_table[sequence : sequence + 1]
        alone = AttentionMetadata(1, [0, 1], [position + 1], table)
        one_1Hd = q_THd[row : row + 1]
        out_THe[row] = torch_attention.paged_attention(one_1Hd, k_cache_NBGd, v_cache_NBGe, alone, **options)[0]
    return out_THe


def _rows(meta: AttentionMetadata) -> tuple[list[int], list[int]]:
    """Sequence and position of every row."""
    return meta.on_device.sequence_T.tolist(), meta.on_device.position_T.tolist()
