"""Checks every op of the face against a float64 reference. Outputs are poisoned: new memory of a kernel holds NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_bench.shapes import Shape, group, route
from moe_runtime.kernels import invariant_ops, kv_rows, ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.quantized import quantize
from moe_runtime.kernels.quantized_slots import QuantizedSlots, dense
from moe_runtime.types.weight_format import Code, Scale, WeightFormat

# Largest difference / largest reference value. An op rounds its result and at most two intermediate results.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
PAGE = 16
FORMATS = {
    "fp8": WeightFormat(Code.FP8, Scale.FLOAT32, 128),
    "mxfp4": WeightFormat(Code.FP4, Scale.E8M0, 32),
    "int4": WeightFormat(Code.INT4, Scale.FLOAT16, 128),
    "int8": WeightFormat(Code.INT8, Scale.BFLOAT16),
}


@dataclass(frozen=True)
class Check:
    """One comparison. `error` is relative to the largest reference value; NaN if the result has one."""

    op: str
    shape: str
    dtype: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialized new tensors hold NaN (integers their largest value) instead of old memory contents."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        assert torch.empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def check_all(shapes: tuple[Shape, ...], device: torch.device, dtype: torch.dtype) -> list[Check]:
    """All ops in each shape."""
    found = []
    make = partial(_randn, device=device, dtype=dtype)
    for shape in shapes:
        for cases in (_experts, _quantized, _rows, _attention):
            for op, actual, expected in cases(shape, make, device):
                error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
                found.append(Check(op, shape.name, str(dtype)[6:], float(error), TOLERANCE[dtype]))
    return found


Make = Callable[..., Tensor]
Cases = Iterator[tuple[str, Tensor, Tensor]]


def _randn(*size: int, scale: float = 1.0, device: torch.device, dtype: torch.dtype) -> Tensor:
    return (torch.randn(size, device=device) * scale).to(dtype)


def _experts(shape: Shape, make: Make, device: torch.device) -> Cases:
    D, inner, E = shape.hidden, shape.intermediate, shape.num_experts
    w13, w2 = make(E, 2 * inner, D, scale=D**-0.5), make(E, D, inner, scale=inner**-0.5)
    for num_tokens, skew in ((3, "balanced"), (200, "zipf")):
        experts_TK = route(shape, num_tokens, skew, device)
        x, weights_TK = make(num_tokens, D), torch.rand(num_tokens, shape.top_k, device=device)
        row, counts = group(experts_TK, E)
        y = torch.empty(len(row), D, dtype=torch.float64, device=device)
        for slot, rows in enumerate(torch.arange(len(row), device=device).split(counts.tolist())):
            gate, up = (x[row[rows]].double() @ w13[slot].double().T).chunk(2, 1)
            y[rows] = (F.silu(gate) * up) @ w2[slot].double().T
        with poisoned():
            order, place, counted = ops.group_by_slot_padded(experts_TK.flatten(), E)
            actual = ops.grouped_mlp(x, order // shape.top_k, counted, w13, w2)
            combined = ops.combine_grouped(actual, place.view_as(experts_TK), weights_TK)
            alone = invariant_ops.grouped_mlp(x, order // shape.top_k, counted, w13, w2)
        yield "group_by_slot_padded", counted, counts
        yield "grouped_mlp", actual, y
        yield "invariant grouped_mlp", alone, y
        y_TKD = y[place.view_as(experts_TK)]
        yield "combine_grouped", combined, (y_TKD * weights_TK[..., None]).sum(1)
    logits, bias = torch.randn(50, E, device=device), torch.randn(E, device=device)
    with poisoned():
        weights_TK, experts_TK = ops.topk_gate(
            logits, top_k=shape.top_k, scoring="sigmoid", correction_bias_E=bias, normalize=True
        )
    scores = logits.double().sigmoid()
    expected = scores.gather(1, (scores + bias).topk(shape.top_k).indices)
    yield "topk_gate", weights_TK, expected / expected.sum(1, keepdim=True)
    yield "topk_gate experts", (scores + bias).gather(1, experts_TK), (scores + bias).topk(shape.top_k).values


def _quantized(shape: Shape, make: Make, device: torch.device) -> Cases:
    D, inner, counts = shape.hidden, shape.intermediate, [3, 0, 70]
    x = make(sum(counts), D)
    for name, format in FORMATS.items():
        w13, w2 = (
            QuantizedSlots(quantize(make(len(counts) * n, k, scale=k**-0.5), format), n)
            for n, k in ((2 * inner, D), (D, inner))
        )
        with poisoned():
            operands = (x, None, torch.tensor(counts, device=device), w13, w2)
            actual, alone = ops.grouped_mlp(*operands), invariant_ops.grouped_mlp(*operands)
            product = ops.quantized_linear(x, w13[0])
        y = torch.empty(len(x), D, dtype=torch.float64, device=device)
        for slot, rows in enumerate(torch.arange(len(x), device=device).split(counts)):
            wide13, wide2 = (dense(w[slot], x.dtype).double() for w in (w13, w2))
            gate, up = (x[rows].double() @ wide13.T).chunk(2, 1)
            y[rows] = (F.silu(gate) * up) @ wide2.T
        yield f"grouped_mlp {name}", actual, y
        yield f"invariant grouped_mlp {name}", alone, y
        yield f"quantized_linear {name}", product, x.double() @ dense(w13[0], x.dtype).double().T


def _rows(shape: Shape, make: Make, device: torch.device) -> Cases:
    D, H, G, d = shape.hidden, shape.heads, shape.kv_heads, shape.head_size
    x, residual, weight = make(37, D), make(37, D), make(D)
    total = (x + residual).double()
    matrix = make(2 * D, D, scale=D**-0.5)
    parts = make(37, H + 2 * G, d)
    q, k, v = parts.split((H, G, G), 1)
    angle = torch.rand(37, d // 2, device=device).repeat(1, 2)
    slot = torch.randperm(64, device=device)[:37]
    with poisoned():
        k_cache, v_cache = torch.zeros_like(k).new_zeros(2, 64 // PAGE, PAGE, G, d)
        normed, added = ops.add_rms_norm(x, residual, weight, 1e-6)
        scaled = ops.scale_rows(residual, x, weight)
        turned = ops.rotary_store_kv(q, k, v, angle.cos(), angle.sin(), k_cache, v_cache, slot)
        activated, product = ops.silu_mul(parts.flatten(1)[:, : 2 * D].contiguous()), invariant_ops.linear(x, matrix)
        plain = ops.rms_norm(q, weight[:1].expand(d).contiguous(), 1e-6)
    for name, dtype in kv_rows.DTYPES.items():
        cache, scale = k_cache.to(dtype), torch.zeros(*k_cache.shape[:3], 1, device=device)
        ops.store_quantized(k, cache, scale, slot, (d,))
        stored = kv_rows.widen_rows(
            cache[slot // PAGE, slot % PAGE], scale[slot // PAGE, slot % PAGE], (d,), dtype=k.dtype
        )
        # On the CPU, because torch divides by a number in another way on GPUs.
        codes, scales = kv_rows.quantize_rows(k.cpu(), dtype, (d,))
        yield f"store_quantized {name}", stored, kv_rows.widen_rows(codes, scales, (d,), k.dtype).to(device)
    yield "add_rms_norm", normed, weight.double() * total / (total.square().mean(1, keepdim=True) + 1e-6).sqrt()
    yield "add_rms_norm sum", added, total
    yield "scale_rows", scaled, residual.double() * (x.double() @ weight.double()).sigmoid()[:, None]
    wide = q.double()
    yield "rms_norm", plain, weight[0].double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    yield "rotary_store_kv queries", turned, _rotate(q.double(), angle.double())
    yield "rotary_store_kv keys", k_cache.flatten(0, 1)[slot], _rotate(k.double(), angle.double())
    yield "rotary_store_kv values", v_cache.flatten(0, 1)[slot], v
    gate, up = parts.flatten(1)[:, : 2 * D].double().chunk(2, 1)
    yield "silu_mul", activated, F.silu(gate) * up
    yield "invariant linear", product, x.double() @ matrix.double().T


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * angle.cos()[:, None] + torch.cat((-second, first), -1) * angle.sin()[:, None]


def _attention(shape: Shape, make: Make, device: torch.device) -> Cases:
    G, d = shape.kv_heads, shape.head_size
    num_query, context = [1, 1, 1, 33, 5], [1, 300, 1100, 290, 5]
    num_pages = [-(-length // PAGE) for length in context]
    pages = torch.randperm(sum(num_pages)).tolist()
    blocks = [[pages.pop() for _ in range(count)] for count in num_pages]
    k_cache, v_cache = make(sum(num_pages), PAGE, G, d), make(sum(num_pages), PAGE, G, d)
    q = make(sum(num_query), shape.heads, d)
    meta = AttentionMetadata.build(num_query, context, blocks, device)
    for window in (None, 270):
        expected = torch.cat(
            [
                _attend(rows, k_cache[page].flatten(0, 1)[:length], v_cache[page].flatten(0, 1)[:length], window)
                for rows, page, length in zip(q.split(num_query), blocks, context, strict=True)
            ]
        )
        options = {"scale": d**-0.5, "sliding_window": window}
        for name, form in (("", ops.paged_attention), ("invariant ", invariant_ops.paged_attention)):
            with poisoned():
                actual = form(q, k_cache, v_cache, meta, **options)
            yield f"{name}paged_attention{' window' if window else ''}", actual, expected
    yield from _quantized_attention(q, k_cache, v_cache, meta, d)


def _quantized_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, d: int) -> Cases:
    """Over rows of 8 bits, and over what they stand for."""
    options: dict[str, Any] = {"scale": d**-0.5, "sliding_window": None}
    for name, dtype in kv_rows.DTYPES.items():
        found = [kv_rows.quantize_rows(cache.flatten(0, 1), dtype, (d,)) for cache in (k_cache, v_cache)]
        codes = [part.view(k_cache.shape) for part, _ in found]
        scales = [part.view(*k_cache.shape[:3], 1) for _, part in found]
        wide = [kv_rows.widen_rows(part, scale, (d,), q.dtype) for part, scale in zip(codes, scales, strict=True)]
        with poisoned():
            actual = ops.paged_attention(q, *codes, meta, **options, kv_scales=kv_rows.KVScales(*scales))
        yield f"paged_attention over {name}", actual, ops.paged_attention(q, *wide, meta, **options)


def _attend(q_QHd: Tensor, k_CGd: Tensor, v_CGd: Tensor, window: int | None) -> Tensor:
    """One sequence in float64."""
    repeat = q_QHd.shape[1] // k_CGd.shape[1]
    k_CHd, v_CHd = k_CGd.double().repeat_interleave(repeat, 1), v_CGd.double().repeat_interleave(repeat, 1)
    score_HQC = torch.einsum("qhd,chd->hqc", q_QHd.double(), k_CHd) * q_QHd.shape[2] ** -0.5
    key_C = torch.arange(len(k_CGd), device=q_QHd.device)
    query_Q1 = key_C[-len(q_QHd) :, None]
    hidden_QC = key_C > query_Q1
    if window is not None:
        hidden_QC |= key_C <= query_Q1 - window
    return torch.einsum("hqc,chd->qhd", score_HQC.masked_fill(hidden_QC, float("-inf")).softmax(-1), v_CHd)
