"""Time the native CPU kernels at one model's shapes, and compare them with their floor and with torch's operations.

The floor of an operation is the longer of two times: bytes it must read / measured read bandwidth, and operations it
must do / measured rate of torch's large matrix product. Floor, kernel and torch are measured in turn, so that all see
the same state of a shared machine; medians are reported. Weights alternate between so many copies that no cache holds
them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from moe_runtime.kernels import torch_attention, torch_ops
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.cpu import loader, native
from moe_runtime.kernels.cpu.blocks import GateCall, SparseCall
from moe_runtime.kernels.cpu.native_step import NativeStep
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 1024, 16, 4, 64
EXPERTS, TOP_K, INNER, VOCAB = 64, 8, 512, 32000
PAGE, DECODE_CONTEXT = 16, 192
DTYPE = torch.bfloat16
ROWS = (1, 4, 8, 32, 256, 2048)


@dataclass(frozen=True)
class Case:
    """An operation at one number of rows: what it must read and multiply, and the two ways to run it."""

    name: str
    rows: int
    nbytes: int
    flops: int
    native: Callable[[int], object]
    torch: Callable[[int], object] | None


@dataclass(frozen=True)
class Result:
    name: str
    rows: int
    threads: int
    floor_us: float
    native_us: float
    torch_us: float | None

    @property
    def of_floor(self) -> float:
        return self.floor_us / self.native_us


class Floor:
    """Read bandwidth and matrix product rate of `threads` threads, measured on request."""

    def __init__(self, kernels: native.Kernels) -> None:
        self.kernels = kernels
        self.data = kernels.packed_empty(torch.float32, 1 << 16, 1 << 10).zero_()  # huge pages, as weights have
        self.x, self.weight = torch.randn(1536, 1024).to(DTYPE), torch.randn(2048, 1024).to(DTYPE)

    def bytes_per_s(self) -> float:
        return self.data.nbytes / seconds(lambda: self.kernels.read(self.data))

    def flops_per_s(self) -> float:
        return 2 * 1536 * 2048 * 1024 / seconds(lambda: F.linear(self.x, self.weight))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_each(call: Callable[[int], object], once_s: float, budget_s: float) -> float:
    """Mean time of a call, over as many calls as fit into the budget."""
    count = max(1, min(200, int(budget_s / once_s)))
    start = time.perf_counter()
    for index in range(count):
        call(index)
    return (time.perf_counter() - start) / count


def linear_cases(kernels: native.Kernels, name: str, outputs: int, copies: int, rows: int, float32: bool) -> Case:
    weights = [torch.randn(outputs, HIDDEN).to(DTYPE) / 32 for _ in range(copies)]
    packed = [PackedLinear.pack(kernels, weight) for weight in weights]
    x = torch.randn(rows, HIDDEN).to(DTYPE)
    return Case(
        name,
        rows,
        nbytes=packed[0].nbytes,
        flops=2 * rows * outputs * HIDDEN,
        native=lambda i: packed[i % copies](x, float32=float32),
        torch=lambda i: F.linear(x, weights[i % copies]),
    )


def small_cases(kernels: native.Kernels, rows: int) -> list[Case]:
    x, residual = torch.randn(rows, HIDDEN).to(DTYPE), torch.randn(rows, HIDDEN).to(DTYPE)
    norm, logits = torch.ones(HIDDEN, dtype=DTYPE), torch.randn(rows, EXPERTS)
    return [
        Case(
            "add_rms_norm",
            rows,
            4 * x.nbytes,
            0,
            lambda _: kernels.add_rms_norm(x, residual, norm, 1e-6),
            lambda _: torch_ops.add_rms_norm(x, residual, norm, 1e-6),
        ),
        Case(
            "topk_gate",
            rows,
            logits.nbytes,
            0,
            lambda _: kernels.topk_gate(logits, top_k=TOP_K, scoring="softmax", normalize=True),
            lambda _: torch_ops.topk_gate(logits, top_k=TOP_K, scoring="softmax", normalize=True),
        ),
    ]


def attention_case(kernels: native.Kernels, rows: int, prefill: bool) -> Case:
    """Decode: one row each of `rows` sequences. Prefill: one prompt of `rows` tokens."""
    num_query, contexts = ([rows], [rows]) if prefill else ([1] * rows, [DECODE_CONTEXT] * rows)
    pages = [-(-context // PAGE) for context in contexts]
    blocks = [list(range(sum(pages[:i]), sum(pages[: i + 1]))) for i in range(len(pages))]
    copies = 4 if prefill else 12
    caches = [torch.randn(2, sum(pages), PAGE, KV_HEADS, HEAD_DIM).to(DTYPE) for _ in range(copies)]
    meta = AttentionMetadata.build(num_query, contexts, blocks, torch.device("cpu"))
    step, q = NativeStep(meta), torch.randn(rows, HEADS, HEAD_DIM).to(DTYPE)
    scale = HEAD_DIM**-0.5
    seen = rows * (rows + 1) // 2 if prefill else rows * DECODE_CONTEXT
    return Case(
        "attention prefill" if prefill else f"attention decode, {DECODE_CONTEXT} keys",
        rows,
        nbytes=4 * sum(contexts) * KV_HEADS * HEAD_DIM,
        flops=4 * seen * HEADS * HEAD_DIM,
        native=lambda i: kernels.paged_attention(
            q, caches[i % copies][0], caches[i % copies][1], step, scale=scale, sliding_window=None
        ),
        torch=lambda i: torch_attention.paged_attention(
            q, caches[i % copies][0], caches[i % copies][1], meta, scale=scale, sliding_window=None
        ),
    )


class SparseLayers:
    """Layers of experts, packed and not, and the cases on them."""

    def __init__(self, kernels: native.Kernels, copies: int) -> None:
        self.kernels = kernels
        self.weights, self.blocks = [], []
        for _ in range(copies):
            w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, dtype=DTYPE) / 32
            w2 = torch.randn(EXPERTS, HIDDEN, INNER, dtype=DTYPE) / 23
            experts = PackedExperts(kernels, EXPERTS, HIDDEN, INNER, DTYPE)
            for slot in range(EXPERTS):
                for part, rows in zip(("gate", "up", "down"), (*w13[slot].chunk(2), w2[slot]), strict=True):
                    experts.put(slot, part, 0, rows)
            gate = native.gate_config(EXPERTS, top_k=TOP_K, scoring="softmax", normalize=True)
            gate_weight = torch.randn(EXPERTS, HIDDEN).to(DTYPE) / 16
            gate = GateCall(kernels, gate, gate_weight)
            self.weights.append((gate_weight, w13, w2))
            self.blocks.append(SparseCall(gate, torch.arange(EXPERTS)[:, None], experts, None))

    def case(self, rows: int) -> Case:
        x, copies, block = torch.randn(rows, HIDDEN).to(DTYPE), len(self.blocks), self.blocks[0]
        touched = len(block.gate(x, 0)[1].unique())
        return Case(
            "sparse block",
            rows,
            nbytes=touched * block.experts.nbytes // EXPERTS + block.gate.nbytes,
            flops=rows * (TOP_K * 6 * INNER * HIDDEN + 2 * EXPERTS * HIDDEN),
            native=lambda i: self.blocks[i % copies](x, rows),
            torch=lambda i: self.with_torch(x, *self.weights[i % copies]),
        )

    @staticmethod
    def with_torch(x: torch.Tensor, gate: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        weights, experts = torch_ops.topk_gate(F.linear(x, gate), top_k=TOP_K, scoring="softmax", normalize=True)
        order, counts = torch_ops.group_by_slot(experts.flatten(), EXPERTS)
        y = torch.empty(len(order), HIDDEN, dtype=DTYPE)
        y[order] = torch_ops.grouped_mlp(x, order // TOP_K, counts, w13, w2)
        return torch_ops.combine_topk(y.view(len(x), TOP_K, HIDDEN), weights)


def build_cases(kernels: native.Kernels, rows_list: list[int], only: str | None) -> list[Case]:
    layers = SparseLayers(kernels, copies=2)
    cases: list[Case] = []
    for rows in rows_list:
        cases.append(linear_cases(kernels, "qkv", (HEADS + 2 * KV_HEADS) * HEAD_DIM, 24, rows, float32=False))
        cases.append(linear_cases(kernels, "output", HIDDEN, 32, rows, float32=False))
        if rows <= 256:
            cases.append(linear_cases(kernels, "head", VOCAB, 1, rows, float32=True))
            cases.append(attention_case(kernels, rows, prefill=False))
        if rows >= 32:
            cases.append(attention_case(kernels, rows, prefill=True))
        cases += small_cases(kernels, rows)
        cases.append(layers.case(rows))
    return [case for case in cases if only is None or only in case.name]


def measure(
    kernels: native.Kernels, cases: list[Case], threads: int, repetitions: int, with_torch: bool
) -> list[Result]:
    kernels.set_threads(threads)
    torch.set_num_threads(threads)
    floor = Floor(kernels)
    results = []
    for case in cases:
        ways = [case.native] + ([case.torch] if with_torch and case.torch else [])
        once = [min(seconds(partial(way, 1)) for _ in range(2)) for way in ways]
        samples: list[list[float]] = []
        for _ in range(repetitions):
            least = max(case.nbytes / floor.bytes_per_s(), case.flops / floor.flops_per_s())
            samples.append([least, *(seconds_each(way, s, 0.02) for way, s in zip(ways, once, strict=True))])
        middle = [statistics.median(column) * 1e6 for column in zip(*samples, strict=True)]
        results.append(
            Result(case.name, case.rows, threads, middle[0], middle[1], middle[2] if len(ways) > 1 else None)
        )
        print(row_of(results[-1]), flush=True)
    return results


def row_of(result: Result) -> str:
    torch_time = "" if result.torch_us is None else f"{result.torch_us:.1f}"
    gain = "" if result.torch_us is None else f"{result.torch_us / result.native_us:.1f}"
    return (
        f"| {result.name} | {result.rows} | {result.threads} | {result.floor_us:.1f} | {result.native_us:.1f} "
        f"| {result.of_floor:.2f} | {torch_time} | {gain} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--instruction-set", choices=["avx512_bf16", "avx512", "avx2"])
    parser.add_argument("--no-torch", action="store_true", help="do not time torch's operations")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()

    kernels = loader.load(options.instruction_set)
    cases = build_cases(kernels, options.rows, options.only)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {kernels.instruction_set}, torch {torch.__version__}")
    results, floors = [], {}
    for threads in sorted(set(options.threads)):
        kernels.set_threads(threads)
        torch.set_num_threads(threads)
        floor = Floor(kernels)
        bandwidth = statistics.median(floor.bytes_per_s() for _ in range(9))
        rate = statistics.median(floor.flops_per_s() for _ in range(9))
        floors[threads] = {"bytes_per_s": bandwidth, "flops_per_s": rate}
        print(f"\n{threads} thread(s): reads {bandwidth / 1e9:.1f} GB/s, torch's product {rate / 1e9:.0f} GFLOP/s\n")
        print("| operation | rows | threads | floor us | native us | of floor | torch us | torch / native |")
        print("|---|---|---|---|---|---|---|---|")
        results += measure(kernels, cases, threads, options.repetitions, not options.no_torch)
    if options.json:
        figures = [asdict(result) | {"of_floor": result.of_floor} for result in results]
        machine = {"cpus": os.cpu_count(), "instruction_set": kernels.instruction_set, "torch": torch.__version__}
        options.json.write_text(json.dumps({"machine": machine, "floors": floors, "results": figures}, indent=2) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
