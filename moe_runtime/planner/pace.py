"""How fast the machine is at the moment, relative to its profile. Needs torch.

On a shared machine, the rates of reading and multiplying change from second to second. So a measurement is compared
with the prediction for the rates at that time. Within a tenth of a second the rates change little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from moe_runtime.kernels.cpu.native import Kernels
from moe_runtime.kernels.cpu.packed import PackedLinear
from moe_runtime.planner.hardware import Hardware
from moe_runtime.planner.measure_kernels import INPUTS, OUTPUTS, ROWS, Stream, median_seconds


class Pace:
    """Current rates of reading and multiplying on all cores, as shares of the profile's rates."""

    def __init__(self, kernels: Kernels, hardware: Hardware) -> None:
        self._kernels, self._hardware = kernels, hardware
        self._stream = Stream(kernels)
        self._x = torch.randn(max(ROWS), INPUTS).bfloat16()
        self._linear = PackedLinear.pack(kernels, torch.randn(OUTPUTS, INPUTS).bfloat16())
        self._rates = (hardware.memory_bandwidth[-1][1], hardware.matrix_rate["bfloat16"][-1][1])

    def read(self) -> float:
        """Share of the profile's bandwidth."""
        with self._all_cores():
            return self._stream.bandwidth() / self._rates[0]

    def now(self) -> tuple[float, float]:
        """Shares of the profile's bandwidth and matrix rate."""
        read = self.read()
        with self._all_cores():
            rate = 2.0 * self._x.numel() * OUTPUTS / median_seconds(partial(self._linear, self._x))
        return read, rate / self._rates[1]

    @contextmanager
    def _all_cores(self) -> Iterator[None]:
        threads, torch_threads = self._kernels.num_threads, torch.get_num_threads()
        torch.set_num_threads(1)  # torch's threads would spin on cores that are measured
        self._kernels.set_threads(self._hardware.cores or 1)
        try:
            yield
        finally:
            self._kernels.set_threads(threads)
            torch.set_num_threads(torch_threads)
