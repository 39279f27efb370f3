"""Measures rates of this machine's cores with the native kernels: reading, products, experts, attention. Needs torch.

Weights take more memory than the caches hold and are used in turn, as in a model.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.cpu.native import Kernels
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear
from moe_runtime.planner.predict import NORM_PASSES

BEYOND_CACHES = 256 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = (1, 2, 4, 6, 8, 12, 16, 32, 64, 128, 512)
OUTPUTS, INPUTS = 2048, 1024
STREAM_OUTPUTS = 32768  # a product so long that its start and end are negligible
EXPERTS, HIDDEN, INNER = 64, 1024, 512  # large experts, of which every other one is used
SLOTS, SLOT_HIDDEN, SLOT_INNER = 32, 576, 64  # small ones
SLOT_ROWS = 128  # rows of each expert; their products take longer than reading the weights
SUM_TOKENS, SUM_TOP_K, SUM_HIDDEN = 256, 8, 1024
HEADS, KV_HEADS, HEAD_DIM, PAGE = 16, 4, 64, 16
DECODE_SEQUENCES, DECODE_KEYS, PROMPT = 32, 1024, 1024
COLD_BYTES = (0, 8 << 20, 16 << 20, 24 << 20, 32 << 20, 48 << 20, 64 << 20, 96 << 20, 128 << 20)
CALLS_TOKENS, CALLS_HIDDEN, CALLS_SLOTS, CALLS_INNER = 2, 128, 4, 64
BUDGET = 0.06  # seconds of calls for a figure, and at least three calls


class KernelBench:
    """Holds the data that is read and multiplied, and measures on request."""

    def __init__(self, kernels: Kernels, cores: int) -> None:
        self._kernels = kernels
        self._threads = sorted({cores, *itertools.takewhile(lambda count: count < cores, (1 << n for n in range(20)))})
        self._stream = Stream(kernels)
        self._x = {name: torch.randn(max(ROWS), INPUTS).to(dtype) for name, dtype in DTYPES.items()}
        self._linears = {name: self._make_linears(dtype) for name, dtype in DTYPES.items()}
        self._large = [make_experts(kernels, EXPERTS, HIDDEN, INNER)]
        self._small = [make_experts(kernels, SLOTS, SLOT_HIDDEN, SLOT_INNER) for _ in range(SLOTS)]
        self._calls = Calls(kernels)
        self._passes = Passes(kernels)
        self._decode = AttentionProbe(kernels, [1] * DECODE_SEQUENCES, [DECODE_KEYS] * DECODE_SEQUENCES)
        self._prompt = AttentionProbe(kernels, [PROMPT], [PROMPT])

    def figures(self) -> dict[tuple[str, int], float]:
        """One round of all figures, by name and number.

        By number of threads: "read" (bytes/s of weights in products of one row), "rate DTYPE" (operations/s of a large
        product). By rows: "rows DTYPE" (seconds of a product on one thread, where reading slows computing least). By
        bytes read before: "calls" (seconds of the interpreter's work).

        With number 0, on all threads in bfloat16: "experts" (bytes/s of large experts with a row each), "decode"
        (bytes/s of keys and values in attention), "prompt" (operations/s of attention). With number 0, on one thread:
        "slot" (seconds that each of many small experts with a row takes beyond reading), "expert byte" (seconds per
        byte of expert rows that a call with many rows takes beyond its operations), "layer byte" (seconds per byte of
        rows in norms and the weighted sum), "copy" (bytes/s). Also "weight DTYPE" (stored bytes per weight).
        """
        kernels, found = self._kernels, {}
        before, torch_threads = kernels.num_threads, torch.get_num_threads()
        torch.set_num_threads(1)  # torch's threads would spin on cores that are measured
        try:
            for count in self._threads:
                kernels.set_threads(count)
                found["read", count] = self._stream.bandwidth()
                for name, x in self._x.items():
                    call = partial(self._linears[name][0], x)
                    found[f"rate {name}", count] = 2.0 * len(x) * OUTPUTS * INPUTS / median_seconds(call)
            found["experts", 0] = self._large[0].nbytes / 2 / experts_seconds(self._large, 1, every=2)
            found["decode", 0] = self._decode.nbytes / median_seconds(self._decode)
            found["prompt", 0] = self._prompt.flops / median_seconds(self._prompt)
            kernels.set_threads(1)
            for nbytes in COLD_BYTES:
                found["calls", nbytes] = self._calls.seconds_after(nbytes)
            for name, x in self._x.items():
                linears = self._linears[name]
                found[f"weight {name}", 0] = linears[0].nbytes / (OUTPUTS * INPUTS)
                turns = itertools.cycle(linears)
                for rows in ROWS:
                    found[f"rows {name}", rows] = median_seconds(partial(_call_next, turns, x[:rows]))
            reading = self._small[0].nbytes * experts_seconds(self._large, 1, every=2) / (self._large[0].nbytes / 2)
            found["slot", 0] = max(experts_seconds(self._small, 1) - reading, 0.0) / SLOTS
            rate = 2.0 * max(ROWS) * OUTPUTS * INPUTS / found["rows bfloat16", max(ROWS)]
            rows = SLOTS * SLOT_ROWS
            products = 2.0 * rows * 3 * SLOT_HIDDEN * SLOT_INNER / rate
            spare = max(experts_seconds(self._small, SLOT_ROWS) - products, 0.0)
            found["expert byte", 0] = spare / (rows * SLOT_HIDDEN * torch.bfloat16.itemsize)
            found["layer byte", 0] = median_seconds(self._passes) / self._passes.nbytes
            source = torch.zeros(BEYOND_CACHES // 4, dtype=torch.uint8)
            target = torch.empty_like(source)
            found["copy", 0] = source.nbytes / median_seconds(partial(target.copy_, source))
        finally:
            kernels.set_threads(before)
            torch.set_num_threads(torch_threads)
        return found

    def _make_linears(self, dtype: torch.dtype) -> list[PackedLinear]:
        weight = torch.randn(OUTPUTS, INPUTS).to(dtype)
        return [PackedLinear.pack(self._kernels, weight) for _ in range(BEYOND_CACHES // 2 // weight.nbytes)]


class Stream:
    """Products of one row with weights that no cache holds, one after the other; they measure the bandwidth."""

    def __init__(self, kernels: Kernels) -> None:
        weight = torch.randn(STREAM_OUTPUTS, INPUTS).bfloat16()
        count = max(BEYOND_CACHES // weight.nbytes, 1)
        self._linears = [PackedLinear.pack(kernels, weight) for _ in range(count)]
        self._x = torch.randn(1, INPUTS).bfloat16()

    def bandwidth(self) -> float:
        """Bytes/s of weights as the kernels store them, with the current number of threads."""
        turns = itertools.cycle(self._linears)
        return self._linears[0].nbytes / median_seconds(partial(_call_next, turns, self._x))


class Calls:
    """The interpreter's work in a layer: a few calls of torch and of native kernels, with almost no data."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._data = kernels.packed_empty(torch.float32, BEYOND_CACHES >> 12, 1 << 10).zero_().flatten()
        self._experts = make_experts(kernels, CALLS_SLOTS, CALLS_HIDDEN, CALLS_INNER)
        self._slot_EP = torch.randn(CALLS_SLOTS, 1)
        self._index_TK = torch.zeros(1, CALLS_TOKENS, dtype=torch.int64)
        self._counts_S = torch.tensor([CALLS_TOKENS] + [0] * (CALLS_SLOTS - 1))
        self._x, self._residual = torch.randn(2, 1, CALLS_HIDDEN).bfloat16()
        self._weights, self._norm = torch.rand(1, CALLS_TOKENS), torch.randn(CALLS_HIDDEN).bfloat16()

    def __call__(self) -> None:
        assert self._slot_EP[self._index_TK, 0].shape == self._weights.shape
        y_RD = self._experts(self._x.repeat(CALLS_TOKENS, 1), None, self._counts_S)
        out_TD = self._kernels.combine(y_RD, None, self._weights) + self._x
        self._kernels.add_rms_norm(out_TD, self._residual, self._norm, 1e-6)

    def seconds_after(self, nbytes: int) -> float:
        """The median time of the calls, if `nbytes` bytes are read before each."""
        count = nbytes // self._data.itemsize
        starts = itertools.cycle(range(0, max(len(self._data) - count, 0) + 1, max(count, 1)))
        samples: list[float] = []
        end = time.perf_counter() + BUDGET
        while len(samples) < 3 or time.perf_counter() < end:
            first = next(starts)
            if count:
                self._kernels.read(self._data[first : first + count])
            start = time.perf_counter()
            self()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)


class Passes:
    """The operations on rows between the products of a layer, in bfloat16: the weighted sum, and two norms.

    Attributes:
        nbytes: bytes of the rows, counted once per read or write, except the rows that the sum writes.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        rows = SUM_TOKENS * SUM_TOP_K
        self._y = torch.randn(rows, SUM_HIDDEN).bfloat16()
        self._order, self._weights = torch.randperm(rows), torch.rand(SUM_TOKENS, SUM_TOP_K)
        self._x, self._residual = torch.randn(2, SUM_TOKENS, SUM_HIDDEN).bfloat16()
        self._norm = torch.randn(SUM_HIDDEN).bfloat16()
        self.nbytes = self._y.nbytes + NORM_PASSES * self._x.nbytes

    def __call__(self) -> None:
        self._kernels.combine(self._y, self._order, self._weights)
        for _ in range(2):
            self._kernels.add_rms_norm(self._x, self._residual, self._norm, 1e-6)


class AttentionProbe:
    """A call of paged attention over several caches in turn, in bfloat16.

    Attributes:
        nbytes: keys and values of a call.
        flops: operations of a call, without masked ones.
    """

    def __init__(self, kernels: Kernels, queries: list[int], keys: list[int]) -> None:
        self._kernels = kernels
        caches = [torch.randn(2, sum(keys) // PAGE, PAGE, KV_HEADS, HEAD_DIM).bfloat16() for _ in range(4)]
        self._turns = itertools.cycle(caches)
        self._q = torch.randn(sum(queries), HEADS, HEAD_DIM).bfloat16()
        ends = itertools.accumulate(count // PAGE for count in keys)
        blocks = [list(range(end - count // PAGE, end)) for end, count in zip(ends, keys, strict=True)]
        self._meta = AttentionMetadata.build(queries, keys, blocks, torch.device("cpu"))
        self.nbytes = caches[0].nbytes
        pairs = sum(count * (2 * total - count + 1) / 2 for count, total in zip(queries, keys, strict=True))
        self.flops = 4.0 * HEADS * HEAD_DIM * pairs

    def __call__(self) -> None:
        k, v = next(self._turns)
        self._kernels.paged_attention(self._q, k, v, self._meta, scale=HEAD_DIM**-0.5, sliding_window=None)


def make_experts(kernels: Kernels, slots: int, hidden: int, inner: int) -> PackedExperts:
    """Experts with random weights, the same in all slots."""
    experts = PackedExperts(kernels, slots, hidden, inner, torch.bfloat16)
    up, down = torch.randn(inner, hidden).bfloat16(), torch.randn(hidden, inner).bfloat16()
    for slot in range(slots):
        experts.put(slot, "gate", 0, up)
        experts.put(slot, "up", 0, up)
        experts.put(slot, "down", 0, down)
    return experts


def experts_seconds(experts: list[PackedExperts], rows: int, every: int = 1) -> float:
    """Seconds of a call in which every slot (or each `every`-th) has `rows` rows; layers take turns."""
    counts = torch.zeros(experts[0].num_slots, dtype=torch.int64)
    counts[::every] = rows
    x = torch.randn(int(counts.sum()), experts[0].hidden_size).bfloat16()
    turns = itertools.cycle(experts)
    return median_seconds(lambda: next(turns)(x, None, counts))


def median_seconds(call: Callable[[], object]) -> float:
    """The median time of a call, without the first."""
    call()
    samples: list[float] = []
    while len(samples) < 3 or sum(samples) < BUDGET:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _call_next(linears: Iterator[PackedLinear], x: torch.Tensor) -> None:
    next(linears)(x)
