"""The ops that have two forms: the usual one, and a batch-invariant one, which costs some speed (`invariant_ops`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from moe_runtime.kernels import invariant_ops, ops, torch_ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.kv_rows import KVScales
from moe_runtime.kernels.quantized_slots import Matrix, MatrixSlots
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU


class GroupedMLP(Protocol):
    """See `ops.grouped_mlp`."""

    def __call__(
        self,
        x_ND: Tensor,
        row_R: Tensor | None,
        counts_S: Tensor,
        w13_SGD: MatrixSlots,
        w2_SDF: MatrixSlots,
        *,
        b13_SG: Tensor | None = None,
        b2_SD: Tensor | None = None,
        swiglu: SwiGLU = PLAIN,
    ) -> Tensor: ...


class PagedAttention(Protocol):
    """See `ops.paged_attention`."""

    def __call__(
        self,
        q_THd: Tensor,
        k_cache_NBGd: Tensor,
        v_cache_NBGe: Tensor,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
        sinks_H: Tensor | None = None,
        kv_scales: KVScales | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Forms:
    """One form of each op: `linear` is that of rows with a dense or quantised matrix, `head_products` is as in
    `torch_ops` on any device, the others are as in `ops`."""

    linear: Callable[[Tensor, Matrix, Tensor | None], Tensor]
    head_products: Callable[[Tensor, Tensor], Tensor]
    grouped_mlp: GroupedMLP
    paged_attention: PagedAttention


def linear(x_NI: Tensor, weight_OI: Matrix, bias_O: Tensor | None = None) -> Tensor:
    """The usual product: torch's of a dense matrix, `ops.quantized_linear` of a quantised one."""
    if isinstance(weight_OI, Tensor):
        return F.linear(x_NI, weight_OI, bias_O)
    return ops.quantized_linear(x_NI, weight_OI, bias_O)


USUAL = Forms(linear, torch_ops.head_products, ops.grouped_mlp, ops.paged_attention)
INVARIANT = Forms(
    invariant_ops.linear, invariant_ops.head_products, invariant_ops.grouped_mlp, invariant_ops.paged_attention
)
