"""The face of the kernels: every op the model uses, on whichever implementation its device has.

Meanings, shapes and errors are those of the torch twins (`torch_ops`, `torch_attention`).
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from moe_runtime.kernels import torch_ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.torch_attention import paged_attention, store_kv
from moe_runtime.kernels.torch_ops import (
    Scoring,
    add_rms_norm,
    apply_rotary,
    combine_topk,
    group_by_slot,
    rms_norm,
    silu_mul,
)

__all__ = [
    "AttentionMetadata",
    "Scoring",
    "add_rms_norm",
    "apply_rotary",
    "combine_topk",
    "describe",
    "group_by_slot",
    "grouped_mlp",
    "paged_attention",
    "rms_norm",
    "silu_mul",
    "store_kv",
    "topk_gate",
]

_TORCH_ONLY = (
    "rms_norm",
    "add_rms_norm",
    "apply_rotary",
    "store_kv",
    "paged_attention",
    "silu_mul",
    "group_by_slot",
    "combine_topk",
)
_TRITON_ON_CUDA = ("topk_gate", "grouped_mlp")


def describe(device: torch.device) -> dict[str, str]:
    """The implementation, "triton" or "torch", that each op has on a device."""
    fused = "triton" if _uses_triton(device) else "torch"
    return dict.fromkeys(_TORCH_ONLY, "torch") | dict.fromkeys(_TRITON_ON_CUDA, fused)


def _uses_triton(device: torch.device) -> bool:
    return device.type == "cuda" and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def topk_gate(
    logits_TE: Tensor,
    *,
    top_k: int,
    scoring: Scoring,
    correction_bias_E: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    normalize: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts: `(weights_TK float32, experts_TK int64)`; see `torch_ops.topk_gate`."""
    if _uses_triton(logits_TE.device):
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
        normalize=normalize,
        scale=scale,
    )


def grouped_mlp(x_ND: Tensor, row_R: Tensor | None, counts_S: Tensor, w13_SGD: Tensor, w2_SDF: Tensor) -> Tensor:
    """SwiGLU experts over rows grouped by slot, `[R, D]` in the grouped order; see `torch_ops.grouped_mlp`."""
    if _uses_triton(x_ND.device):
        from moe_runtime.kernels.triton import grouped_gemm

        return grouped_gemm.grouped_mlp(x_ND, row_R, counts_S, w13_SGD, w2_SDF)
    return torch_ops.grouped_mlp(x_ND, row_R, counts_S, w13_SGD, w2_SDF)
