"""Times of the ops, of torch's alternatives and of two floors: bytes / copy rate, operations / matrix rate.

A time is the median of several runs. Each run is timed between two events, with new inputs and a flushed cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_bench.shapes import SKEWS, Shape, group, route
from moe_runtime.kernels import invariant_ops, ops, torch_ops
from moe_runtime.kernels.attention import AttentionMetadata

PAGE = 16
Calls = dict[str, Callable[[int], object] | None]


@dataclass(frozen=True)
class Row:
    """One case: microseconds of ours, of each alternative (`None` if it cannot run) and of both floors."""

    what: str
    shape: str
    case: str
    ours_us: float
    others_us: dict[str, float | None]
    bytes_us: float
    flops_us: float

    @property
    def floor_share(self) -> float:
        """The higher floor over our time."""
        return max(self.bytes_us, self.flops_us) / self.ours_us

    @property
    def best_other(self) -> float | None:
        """The fastest alternative's time over ours: above 1, ours is faster."""
        times = [us for name, us in self.others_us.items() if us is not None and not name.startswith("ours")]
        return min(times) / self.ours_us if times else None


@dataclass
class Clock:
    """Times calls on a device, and measures the device's best rates."""

    device: torch.device
    repeats: int
    bytes_per_s: float = field(init=False)
    flops_per_s: float = field(init=False)

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        self._flush = torch.empty(256 << 20 if on_gpu else 1 << 20, dtype=torch.uint8, device=self.device)
        source = torch.empty(1 << 30 if on_gpu else 1 << 22, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * source.nbytes / self.us(lambda _: target.copy_(source)) * 1e6
        size = 8192 if on_gpu else 256
        a, b = torch.randn(2, size, size, device=self.device).bfloat16()
        self.flops_per_s = 2 * size**3 / self.us(lambda _: a @ b) * 1e6

    def us(self, call: Callable[[int], object]) -> float:
        """Median microseconds of `call(i)`, without the first two runs."""
        times = [self._once(call, run) for run in range(self.repeats + 2)]
        return statistics.median(times[2:])

    def _once(self, call: Callable[[int], object], run: int) -> float:
        self._flush.zero_()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call(run)
            return (time.perf_counter() - begin) * 1e6
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(run)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def row(
        self,
        what: str,
        shape: str,
        case: str,
        calls: Calls,
        nbytes: float,
        flops: float,
    ) -> Row:
        """Time "ours" and the alternatives of one case."""
        times = {name: None if call is None else self.us(call) for name, call in calls.items()}
        ours = times.pop("ours")
        assert ours is not None
        return Row(what, shape, case, ours, times, nbytes / self.bytes_per_s * 1e6, flops / self.flops_per_s * 1e6)


def experts(shape: Shape, tokens: tuple[int, ...], clock: Clock) -> Iterator[Row]:
    """The expert MLP with its gather, for each number of tokens, balanced and skewed."""
    device, (E, D, inner) = clock.device, (shape.num_experts, shape.hidden, shape.intermediate)
    w13 = torch.empty(E, 2 * inner, D, device=device, dtype=torch.bfloat16).normal_(std=D**-0.5)
    w2 = torch.empty(E, D, inner, device=device, dtype=torch.bfloat16).normal_(std=inner**-0.5)
    for num_tokens in tokens:
        for skew in SKEWS:
            routings = [group(route(shape, num_tokens, skew, device, seed), E) for seed in range(3)]
            used = statistics.mean(int((counts > 0).sum()) for _, counts in routings)
            rows = num_tokens * shape.top_k
            yield clock.row(
                "experts",
                shape.name,
                f"{num_tokens} tokens {skew}",
                _expert_calls(torch.randn(3, num_tokens, D, device=device).bfloat16(), routings, w13, w2),
                nbytes=used * shape.expert_bytes + (num_tokens + rows) * D * 2,
                flops=rows * 6 * D * inner,
            )


def _expert_calls(x_3TD: Tensor, routings: list[tuple[Tensor, Tensor]], w13: Tensor, w2: Tensor) -> Calls:
    lists = [counts.tolist() for _, counts in routings]

    def loop(run: int) -> object:
        rows = x_3TD[run % 3][routings[run % 3][0]].split(lists[run % 3])
        return torch.cat([F.linear(_swiglu(F.linear(r, w13[e])), w2[e]) for e, r in enumerate(rows) if len(r)])

    def grouped_mm(run: int) -> object:
        row, counts = routings[run % 3]
        ends = counts.cumsum(0).to(torch.int32)
        inner = _swiglu(torch._grouped_mm(x_3TD[run % 3][row], w13.transpose(1, 2), ends))
        return torch._grouped_mm(inner, w2.transpose(1, 2), ends)

    has_grouped_mm = x_3TD.is_cuda and torch.cuda.get_device_capability() >= (9, 0)
    return {
        "ours": lambda run: ops.grouped_mlp(x_3TD[run % 3], *routings[run % 3], w13, w2),
        "ours, batch-invariant": lambda run: invariant_ops.grouped_mlp(x_3TD[run % 3], *routings[run % 3], w13, w2),
        "cuBLAS loop": loop,
        "torch._grouped_mm": grouped_mm if has_grouped_mm else None,
    }


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def decode_attention(shape: Shape, cases: tuple[tuple[int, int], ...], clock: Clock) -> Iterator[Row]:
    """One row per sequence, compared with SDPA over contiguous keys."""
    H, G, d = shape.heads, shape.kv_heads, shape.head_size
    for batch, context in cases:
        pages = -(-context // PAGE)
        k_cache, v_cache = torch.randn(2, batch * pages, PAGE, G, d, device=clock.device).bfloat16()
        blocks = torch.randperm(batch * pages).view(batch, pages).tolist()
        meta = AttentionMetadata.build([1] * batch, [context] * batch, blocks, clock.device)
        q = torch.randn(3, batch, H, d, device=clock.device).bfloat16()
        k, v = (c.view(batch, pages * PAGE, G, d)[:, :context].transpose(1, 2) for c in (k_cache, v_cache))
        yield clock.row(
            "decode attention",
            shape.name,
            f"{batch} x {context} keys",
            {
                "ours": lambda run, q=q, k=k_cache, v=v_cache, meta=meta: ops.paged_attention(
                    q[run % 3], k, v, meta, scale=d**-0.5, sliding_window=None
                ),
                "SDPA": lambda run, q=q, k=k, v=v: F.scaled_dot_product_attention(
                    q[run % 3][:, :, None], k, v, enable_gqa=True
                ),
            },
            nbytes=2 * batch * context * G * d * 2,
            flops=4 * batch * context * H * d,
        )


def prefill_attention(shape: Shape, lengths: tuple[int, ...], clock: Clock) -> Iterator[Row]:
    """A whole prompt, compared with causal SDPA."""
    for length in lengths:
        yield clock.row(
            "prefill attention",
            shape.name,
            f"{length} tokens",
            _prefill_calls(shape, length, clock.device),
            nbytes=2 * length * (shape.heads + shape.kv_heads) * shape.head_size * 2,
            flops=2 * length * length * shape.heads * shape.head_size,
        )


def _prefill_calls(shape: Shape, length: int, device: torch.device) -> Calls:
    pages = -(-length // PAGE)
    caches = torch.randn(2, pages, PAGE, shape.kv_heads, shape.head_size, device=device).bfloat16().unbind()
    meta = AttentionMetadata.build([length], [length], [torch.randperm(pages).tolist()], device)
    q = torch.randn(3, length, shape.heads, shape.head_size, device=device).bfloat16()
    k, v = (cache.flatten(0, 1)[None, :length].transpose(1, 2) for cache in caches)
    options: dict[str, Any] = {"scale": shape.head_size**-0.5, "sliding_window": None}
    return {
        "ours": lambda run: ops.paged_attention(q[run % 3], *caches, meta, **options),
        "ours, batch-invariant": lambda run: invariant_ops.paged_attention(q[run % 3], *caches, meta, **options),
        "SDPA": lambda run: F.scaled_dot_product_attention(
            q[run % 3][None].transpose(1, 2), k, v, is_causal=True, enable_gqa=True
        ),
    }


def small_ops(shape: Shape, tokens: tuple[int, ...], clock: Clock) -> Iterator[Row]:
    """The ops between the products; the alternatives are the torch twins."""
    for num_tokens in tokens:
        for name, calls, nbytes, flops in _small_cases(shape, num_tokens, clock.device):
            yield clock.row(name, shape.name, f"{num_tokens} tokens", calls, nbytes, flops)


def _small_cases(shape: Shape, num_tokens: int, device: torch.device) -> Iterator[tuple[str, Calls, float, float]]:
    D, E, K = shape.hidden, shape.num_experts, shape.top_k
    weight_D, matrix_DD = torch.randn(D, device=device).bfloat16(), torch.randn(D, D, device=device).bfloat16()
    x, residual = torch.randn(2, 3, num_tokens, D, device=device).bfloat16()
    logits = torch.randn(3, num_tokens, E, device=device)
    slot = torch.randint(E, (3, num_tokens * K), device=device)
    y, weights = torch.randn(num_tokens * K, D, device=device).bfloat16(), torch.rand(num_tokens, K, device=device)
    place = torch.randperm(num_tokens * K, device=device).view(num_tokens, K)
    row_bytes, pairs = num_tokens * D * 2, num_tokens * K

    def both(call: Callable[[Any, int], object]) -> Calls:
        return {"ours": lambda run: call(ops, run), "torch twin": lambda run: call(torch_ops, run)}

    yield (
        "add_rms_norm",
        both(lambda o, run: o.add_rms_norm(x[run % 3], residual[run % 3], weight_D, 1e-6)),
        4 * row_bytes,
        0,
    )
    yield (
        "topk_gate",
        both(lambda o, run: o.topk_gate(logits[run % 3], top_k=K, scoring="softmax", normalize=True)),
        logits[0].nbytes + pairs * 12,
        0,
    )
    yield "group_by_slot_padded", both(lambda o, run: o.group_by_slot_padded(slot[run % 3], E)), pairs * 24, 0
    yield "combine_grouped", both(lambda o, run: o.combine_grouped(y, place, weights)), (K + 1) * row_bytes, 0
    linear: Calls = {
        "ours": lambda run: invariant_ops.linear(x[run % 3], matrix_DD),
        "cuBLAS": lambda run: F.linear(x[run % 3], matrix_DD),
    }
    yield "batch-invariant linear", linear, matrix_DD.nbytes + 2 * row_bytes, 2 * num_tokens * D * D
