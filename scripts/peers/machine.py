"""The machine's current rates, as a driver: `python -m peers.machine THREADS`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_runtime.kernels.cpu import loader
from moe_runtime.kernels.cpu.packed import PackedLinear
from peers.protocol import serve, take_stdout

READ_BYTES = 256 << 20  # far more than any cache holds
ROWS, OUTPUTS, INPUTS = 1536, 2048, 1024
SECONDS = 0.08


class Machine:
    """Read bandwidth, and the rate of a large bfloat16 product: the faster of torch's (oneDNN) and our packed one."""

    def __init__(self, threads: int) -> None:
        self.kernels = loader.load()
        self.threads = threads
        # Huge pages, as packed weights have.
        self.data = self.kernels.packed_empty(torch.float32, READ_BYTES // 4096, 1024).zero_()
        self.x = torch.randn(ROWS, INPUTS).bfloat16()
        self.weight = torch.randn(OUTPUTS, INPUTS).bfloat16()
        self.packed = PackedLinear.pack(self.kernels, self.weight)

    def measure(self) -> dict[str, float]:
        """Bytes and operations per second of all threads, and of half of them (one of two ranks)."""
        found = {}
        for name, threads in (("all", self.threads), ("rank", max(1, self.threads // 2))):
            self.kernels.set_threads(threads)
            torch.set_num_threads(threads)
            found[f"bytes_per_s_{name}"] = self.data.nbytes * _rate(lambda: self.kernels.read(self.data))
            products = (lambda: F.linear(self.x, self.weight), lambda: self.packed(self.x))
            found[f"flops_per_s_{name}"] = 2 * ROWS * OUTPUTS * INPUTS * max(_rate(call) for call in products)
        return found


def _rate(call: Callable[[], object]) -> float:
    """Calls per second, after one warm-up call."""
    call()
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < SECONDS:
        call()
        count += 1
    return count / spent


def main() -> None:
    answers = take_stdout()
    with torch.inference_mode():
        serve(answers, {"measure": Machine(int(sys.argv[1])).measure})


if __name__ == "__main__":
    main()
