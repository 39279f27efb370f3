"""The interface of the kernels: every op that the model uses, in the implementation that its device has.

Meanings, shapes and errors are those of the torch twins (`torch_ops`, `torch_attention`, `quantized_ops`).
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_runtime.kernels import kv_rows, quantized_ops, torch_attention, torch_ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.kv_rows import KVScales
from moe_runtime.kernels.quantized import QuantizedMatrix
from moe_runtime.kernels.quantized_slots import MatrixSlots
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU
from moe_runtime.kernels.torch_ops import Scoring

__all__ = [
    "AttentionMetadata",
    "Scoring",
    "add_rms_norm",
    "apply_rotary",
    "combine_grouped",
    "combine_topk",
    "decode_attention",
    "describe",
    "group_by_slot",
    "group_by_slot_padded",
    "grouped_mlp",
    "paged_attention",
    "quantized_linear",
    "rms_norm",
    "rotary_store_kv",
    "scale_rows",
    "silu_mul",
    "store_kv",
    "store_quantized",
    "topk_gate",
]


def describe(device: torch.device) -> dict[str, str]:
    """The implementation, "triton" or "torch", that each op has on a device."""
    names = [name for name in __all__ if name.islower() and name != "describe"]
    return dict.fromkeys(names, "triton" if uses_triton(device) else "torch")


def uses_triton(device: torch.device) -> bool:
    """Whether ops on a device are Triton's."""
    return device.type == "cuda" and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension; see `torch_ops.rms_norm`."""
    if uses_triton(x_TD.device):
        from moe_runtime.kernels.triton import norms

        return norms.rms_norm(x_TD, weight_D, eps)
    return torch_ops.rms_norm(x_TD, weight_D, eps)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`(normed, residual + multiplier * x)`; see `torch_ops.add_rms_norm`."""
    if uses_triton(x_TD.device):
        from moe_runtime.kernels.triton import norms

        return norms.add_rms_norm(x_TD, residual_TD, weight_D, eps, multiplier)
    return torch_ops.add_rms_norm(x_TD, residual_TD, weight_D, eps, multiplier)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """`silu(gate) * up`; see `torch_ops.silu_mul`."""
    if uses_triton(gate_up_T2F.device):
        from moe_runtime.kernels.triton import norms

        return norms.silu_mul(gate_up_T2F)
    return torch_ops.silu_mul(gate_up_T2F)


def scale_rows(out_TD: Tensor, x_TD: Tensor, gate_D: Tensor) -> Tensor:
    """Rows times the sigmoid of a product; see `torch_ops.scale_rows`."""
    if uses_triton(out_TD.device):
        from moe_runtime.kernels.triton import norms

        return norms.scale_rows(out_TD, x_TD, gate_D)
    return torch_ops.scale_rows(out_TD, x_TD, gate_D)


def apply_rotary(q_THd: Tensor, k_TGd: Tensor, cos_Tr: Tensor, sin_Tr: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys; see `torch_ops.apply_rotary`."""
    if uses_triton(q_THd.device):
        from moe_runtime.kernels.triton import rotary

        return rotary.apply_rotary(q_THd, k_TGd, cos_Tr, sin_Tr)
    return torch_ops.apply_rotary(q_THd, k_TGd, cos_Tr, sin_Tr)


def store_kv(
    k_TGd: Tensor,
    v_TGd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    cache_position_T: Tensor,
    kv_scales: KVScales | None = None,
) -> None:
    """Write keys and values into the cache; see `torch_attention.store_kv`."""
    operands = (k_TGd, v_TGd, k_cache_NBGd, v_cache_NBGd, cache_position_T, kv_scales)
    if uses_triton(k_TGd.device):
        from moe_runtime.kernels.triton import rotary

        return rotary.store_kv(*operands)
    return torch_attention.store_kv(*operands)


def store_quantized(
    x_TGd: Tensor, cache_NBGd: Tensor, scale_NBGP: Tensor, cache_position_T: Tensor, parts: tuple[int, ...]
) -> None:
    """Write rows into a cache of 8 bits; see `kv_rows.store_quantized`."""
    operands = (x_TGd, cache_NBGd, scale_NBGP, cache_position_T, parts)
    if uses_triton(x_TGd.device):
        from moe_runtime.kernels.triton import quantized_rows

        return quantized_rows.store_quantized(*operands)
    return kv_rows.store_quantized(*operands)


def rotary_store_kv(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    cache_position_T: Tensor,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """`apply_rotary` and `store_kv` in one; returns the rotated queries; see `torch_attention.rotary_store_kv`."""
    operands = (q_THd, k_TGd, v_TGd, cos_Tr, sin_Tr, k_cache_NBGd, v_cache_NBGd, cache_position_T, kv_scales)
    if uses_triton(q_THd.device):
        from moe_runtime.kernels.triton import rotary

        return rotary.rotary_store_kv(*operands)
    return torch_attention.rotary_store_kv(*operands)


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
    if uses_triton(q_THd.device):
        from moe_runtime.kernels.triton import attention

        implementation = attention.paged_attention
    else:
        implementation = torch_attention.paged_attention
    return implementation(
        q_THd,
        k_cache_NBGd,
        v_cache_NBGe,
        meta,
        scale=scale,
        sliding_window=sliding_window,
        sinks_H=sinks_H,
        kv_scales=kv_scales,
    )


def decode_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGe: Tensor,
    page_table: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    *,
    max_context: int,
    scale: float,
    sliding_window: int | None,
    sinks_H: Tensor | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """Attention of single rows, without a device sync; see `torch_attention.decode_attention`."""
    operands = (q_THd, k_cache_NBGd, v_cache_NBGe, page_table, sequence_T, position_T)
    options: dict[str, Any] = {
        "max_context": max_context,
        "scale": scale,
        "sliding_window": sliding_window,
        "sinks_H": sinks_H,
        "kv_scales": kv_scales,
    }
    if uses_triton(q_THd.device):
        from moe_runtime.kernels.triton.decode_attention import decode_attention as implementation

        return implementation(*operands, **options)
    return torch_attention.decode_attention(*operands, **options)


def topk_gate(
    logits_TE: Tensor,
    *,
    top_k: int,
    scoring: Scoring,
    correction_bias_E: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    groups_by_best: bool = False,
    normalize: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts: `(weights_TK float32, experts_TK int64)`; see `torch_ops.topk_gate`."""
    if uses_triton(logits_TE.device):
        from moe_runtime.kernels.triton import gate

        implementation = gate.topk_gate
    else:
        implementation = torch_ops.topk_gate
    return implementation(
        logits_TE,
        top_k=top_k,
        scoring=scoring,
        correction_bias_E=correction_bias_E,
        num_groups=num_groups,
        topk_groups=topk_groups,
        groups_by_best=groups_by_best,
        normalize=normalize,
        scale=scale,
    )


def group_by_slot(slot_R: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """`(order, counts_S)`; waits for the device; see `torch_ops.group_by_slot`."""
    if uses_triton(slot_R.device):
        from moe_runtime.kernels.triton import group

        return group.group_by_slot(slot_R, num_slots)
    return torch_ops.group_by_slot(slot_R, num_slots)


def group_by_slot_padded(slot_R: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(order_R, place_R, counts_S)`, without a device sync; see `torch_ops.group_by_slot_padded`."""
    if uses_triton(slot_R.device):
        from moe_runtime.kernels.triton import group

        return group.group_by_slot_padded(slot_R, num_slots)
    return torch_ops.group_by_slot_padded(slot_R, num_slots)


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
    options: dict[str, Any] = {"b13_SG": b13_SG, "b2_SD": b2_SD, "swiglu": swiglu}
    if uses_triton(x_ND.device):
        from moe_runtime.kernels.triton import grouped_gemm

        return grouped_gemm.grouped_mlp(x_ND, row_R, counts_S, w13_SGD, w2_SDF, **options)
    return torch_ops.grouped_mlp(x_ND, row_R, counts_S, w13_SGD, w2_SDF, **options)


def quantized_linear(x_NI: Tensor, weight_OI: QuantizedMatrix, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` with a quantised weight, `[N, O]`; see `quantized_ops.quantized_linear`."""
    if uses_triton(x_NI.device):
        from moe_runtime.kernels.triton import dense_gemm

        return dense_gemm.quantized_linear(x_NI, weight_OI, bias_O)
    return quantized_ops.quantized_linear(x_NI, weight_OI, bias_O)


def combine_topk(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of each token's expert rows, in order of `k`; see `torch_ops.combine_topk`."""
    if uses_triton(y_TKD.device):
        from moe_runtime.kernels.triton import group

        return group.combine_topk(y_TKD, weights_TK)
    return torch_ops.combine_topk(y_TKD, weights_TK)


def combine_grouped(y_RD: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """`combine_topk` of rows in the grouped order; see `torch_ops.combine_grouped`."""
    if uses_triton(y_RD.device):
        from moe_runtime.kernels.triton import group

        return group.combine_grouped(y_RD, place_TK, weights_TK)
    return torch_ops.combine_grouped(y_RD, place_TK, weights_TK)
