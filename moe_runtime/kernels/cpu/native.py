"""The native CPU kernels as calls that take torch tensors; they compute what the torch twins compute.

A call checks only what is cheap to check. The classes of `packed` and `blocks` keep pointers and sizes that do not
change in C structs. Sums are in float32 and in one order per output: a row's result has the same bits alone, in a
batch, and for any number of threads.

Shape suffixes: T tokens, D hidden, F expert intermediate, E logical experts, S local slots, K experts per token,
N input rows, R received rows, H query heads, G key/value heads, d head size, r rotated dimensions, B page size.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.cpu.kv_pages import kv_pages
from moe_runtime.kernels.cpu.native_step import NativeStep, pointer
from moe_runtime.kernels.cpu.structs import AttentionShape, GateConfig
from moe_runtime.kernels.kv_rows import KVScales
from moe_runtime.kernels.torch_ops import Scoring, check_gate
from moe_runtime.system.pages import HUGE_PAGE, ask_for_huge_pages
from moe_runtime.types.weight_format import WeightFormat

DTYPES = (torch.float32, torch.bfloat16)
CACHE_LINE = 64
SLAB_BYTES = 64 << 20


def native_format(dtype: torch.dtype) -> WeightFormat:
    """The format in which the kernels store matrices of a dtype.

    Raises:
        ValueError: the dtype is neither float32 nor bfloat16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} is not allowed; it must be torch.float32 or torch.bfloat16")
    return WeightFormat.of(str(dtype).removeprefix("torch."), native=True)


def native_code(dtype: torch.dtype) -> int:
    """The library's number for a dtype of activations. Raises ValueError as `native_format` does."""
    return native_format(dtype).code.native


def element(tensor: Tensor) -> int:
    """The library's number for a tensor's dtype. Raises ValueError as `native_format` does."""
    return native_code(tensor.dtype)


def check_arrived(late: int, timeout_ns: int) -> None:
    """Raise TimeoutError if a rank came too late to an exchange: `late` is its number, negative if all came in time."""
    if late >= 0:
        raise TimeoutError(f"symmetric: no rows from rank {late} within {timeout_ns / 1e9:g} s")


def gate_config(
    num_experts: int,
    *,
    top_k: int,
    scoring: Scoring,
    correction_bias_E: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    groups_by_best: bool = False,
    normalize: bool,
    scale: float = 1.0,
) -> GateConfig:
    """The C struct of a gate."""
    check_gate(num_experts, top_k, scoring, num_groups, topk_groups, groups_by_best)
    assert correction_bias_E is None or correction_bias_E.dtype == torch.float32
    bias = pointer(correction_bias_E)
    config = GateConfig(
        experts=num_experts,
        top_k=top_k,
        groups=num_groups,
        topk_groups=topk_groups,
        sigmoid=scoring == "sigmoid",
        normalize=normalize,
        groups_by_best=groups_by_best,
        scale=scale,
        correction_bias=bias,
    )
    config.keep = correction_bias_E
    return config


class Kernels:
    """The loaded library. Ops that need no packed weight; the signatures are those of the torch twins.

    Attributes:
        instruction_set: the one that the library was compiled for.
        library: the C functions.
    """

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self.library = library
        self.instruction_set = instruction_set
        self._slab: Tensor | None = None
        self._slab_used = 0

    @property
    def num_threads(self) -> int:
        """Threads that take part in a call, the caller included."""
        count: int = self.library.moe_num_threads()
        return count

    def set_threads(self, count: int) -> None:
        """Set the number of threads. They inherit the caller's CPU affinity at the time of this call.

        Raises:
            ValueError: less than one.
        """
        if count < 1:
            raise ValueError(f"num_threads: {count} is not allowed; it must be at least 1")
        self.library.moe_set_threads(count)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `torch_ops.rms_norm`."""
        out = torch.empty_like(x_TD)
        size = x_TD.shape[-1]
        assert weight_D.dtype == x_TD.dtype and len(weight_D) == size
        rows = x_TD.numel() // size
        self.library.moe_rms_norm(element(x_TD), pointer(x_TD), pointer(weight_D), rows, size, eps, out.data_ptr())
        return out

    def add_rms_norm(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        multiplier: float = 1.0,
        *,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `torch_ops.add_rms_norm`; with `in_place` the results overwrite `x_TD` and `residual_TD`."""
        out, total = (x_TD, residual_TD) if in_place else (torch.empty_like(x_TD), torch.empty_like(x_TD))
        rows, size = x_TD.shape
        assert residual_TD.shape == x_TD.shape and len(weight_D) == size
        assert x_TD.dtype == residual_TD.dtype == weight_D.dtype
        self.library.moe_add_rms_norm(
            element(x_TD),
            pointer(x_TD),
            pointer(residual_TD),
            pointer(weight_D),
            rows,
            size,
            eps,
            multiplier,
            total.data_ptr(),
            out.data_ptr(),
        )
        return out, total

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """See `torch_ops.silu_mul`; rounded once, at the end."""
        rows, size = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
        out = gate_up_T2F.new_empty(rows, size)
        self.library.moe_silu_mul(element(gate_up_T2F), pointer(gate_up_T2F), rows, size, out.data_ptr())
        return out

    def paged_attention(
        self,
        q_THd: Tensor,
        k_cache_NBGd: Tensor,
        v_cache_NBGe: Tensor,
        meta: AttentionMetadata | NativeStep,
        *,
        scale: float,
        sliding_window: int | None,
        sinks_H: Tensor | None = None,
        kv_scales: KVScales | None = None,
    ) -> Tensor:
        """See `torch_attention.paged_attention`; bitwise independent of chunking and batching."""
        step = meta if isinstance(meta, NativeStep) else NativeStep(meta)
        num_tokens, heads, head_size = q_THd.shape
        groups, value_size = v_cache_NBGe.shape[2:]
        assert num_tokens == step.layout.tokens and heads % groups == 0
        assert kv_scales is not None or k_cache_NBGd.dtype == q_THd.dtype
        pages = kv_pages(k_cache_NBGd, v_cache_NBGe, kv_scales)
        shape = AttentionShape(
            heads=heads,
            kv_heads=groups,
            head_size=head_size,
            value_size=value_size,
            window=sliding_window or 0,
            sinks=pointer(sinks_H),
            scale=scale,
        )
        out_THe = q_THd.new_empty(num_tokens, heads, value_size)
        self.library.moe_paged_attention(
            element(q_THd),
            ctypes.addressof(shape),
            ctypes.addressof(pages),
            step.address,
            pointer(q_THd),
            heads * head_size,
            out_THe.data_ptr(),
        )
        return out_THe

    def topk_gate(
        self,
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
        """See `torch_ops.topk_gate`."""
        num_tokens, num_experts = logits_TE.shape
        config = gate_config(
            num_experts,
            top_k=top_k,
            scoring=scoring,
            correction_bias_E=correction_bias_E,
            num_groups=num_groups,
            topk_groups=topk_groups,
            groups_by_best=groups_by_best,
            normalize=normalize,
            scale=scale,
        )
        logits_TE = logits_TE.float().contiguous()
        weights_TK = torch.empty(num_tokens, top_k)
        experts_TK = torch.empty(num_tokens, top_k, dtype=torch.int64)
        self.library.moe_topk_gate(
            ctypes.addressof(config), logits_TE.data_ptr(), num_tokens, weights_TK.data_ptr(), experts_TK.data_ptr()
        )
        return weights_TK, experts_TK

    def argmax(self, x_TV: Tensor) -> list[int]:
        """See `torch_ops.argmax`; of equal values the first, in float32."""
        assert x_TV.dtype == torch.float32 and x_TV.ndim == 2 and x_TV.shape[1] > 0
        rows, size = x_TV.shape
        best = (ctypes.c_int64 * rows)()
        self.library.moe_argmax(pointer(x_TV), rows, size, best)
        return list(best)

    def group_by_slot(self, slot_R: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
        """See `torch_ops.group_by_slot`."""
        assert slot_R.dtype == torch.int64
        order_R = torch.empty_like(slot_R)
        counts_S = torch.empty(num_slots, dtype=torch.int64)
        kept = self.library.moe_group_by_slot(
            pointer(slot_R), len(slot_R), num_slots, order_R.data_ptr(), counts_S.data_ptr()
        )
        return order_R[:kept], counts_S

    def combine_topk(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        """See `torch_ops.combine_topk`."""
        return self.combine(y_TKD.view(-1, y_TKD.shape[2]), None, weights_TK)

    def combine(self, y_RD: Tensor, order_R: Tensor | None, weights_TK: Tensor) -> Tensor:
        """Weighted sum of each token's expert rows, `[T, D]`; row `i` of `y_RD` is that of (token, k) `order_R[i]`.

        Args:
            order_R: int64, as `group_by_slot` returns it; None if the rows are in order. A (token, k) that is not in it
                adds nothing.
            weights_TK: float32.
        """
        num_tokens, top_k = weights_TK.shape
        num_rows, hidden = y_RD.shape
        assert weights_TK.dtype == torch.float32 and num_rows <= num_tokens * top_k
        assert order_R is None or (order_R.dtype == torch.int64 and len(order_R) == num_rows)
        out_TD = y_RD.new_empty(num_tokens, hidden)
        self.library.moe_combine(
            element(y_RD),
            pointer(y_RD),
            num_rows,
            pointer(order_R),
            pointer(weights_TK),
            num_tokens,
            top_k,
            hidden,
            out_TD.data_ptr(),
        )
        return out_TD

    def packed_empty(
        self, dtype: torch.dtype, outputs: int, inputs: int, copies: int = 1, quant: int | None = None
    ) -> Tensor:
        """Room for `copies` packed weights `[outputs, inputs]`, uint8 `[copies, bytes]`, in huge pages.

        Args:
            quant: address of the C struct of their format, if they are quantised.
        """
        nbytes: int
        if quant is None:
            nbytes = self.library.moe_packed_bytes(native_code(dtype), outputs, inputs)
        else:
            nbytes = self.library.moe_quantized_bytes(quant, outputs, inputs)
        return self._room(copies * nbytes).view(copies, nbytes)

    def _room(self, nbytes: int) -> Tensor:
        """Bytes that begin at a cache line. Small weights share slabs, so that they also get huge pages."""
        if nbytes >= SLAB_BYTES // 4:
            return self._huge_pages(nbytes)
        if self._slab is None or self._slab_used + nbytes > SLAB_BYTES:
            self._slab, self._slab_used = self._huge_pages(SLAB_BYTES), 0
        room = self._slab[self._slab_used : self._slab_used + nbytes]
        self._slab_used += -(-nbytes // CACHE_LINE) * CACHE_LINE
        return room

    def _huge_pages(self, nbytes: int) -> Tensor:
        whole = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        room = whole[start : start + nbytes]
        ask_for_huge_pages(room)
        return room

    def read(self, tensor: Tensor) -> None:
        """Read a tensor's whole MiB once with all threads: the lower bound on the time of streaming weights."""
        self.library.moe_read(pointer(tensor), tensor.nbytes)
