"""Work beside the main stream: what waits for what, on a GPU that only notes it; on CPUs a plain call."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import FakeCuda

from moe_runtime.layers.side_stream import SideStream, side_stream


def test_each_stream_waits_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    side_stream.cache_clear()
    beside = SideStream(torch.device("cuda", 0))
    side_stream.cache_clear()  # other tests' GPUs are none of these

    def shared(x: torch.Tensor) -> torch.Tensor:
        cuda.note("shared experts")
        return x * 2

    x = torch.randn(3)
    join = beside.start(shared, x)
    cuda.note("dispatch")
    assert torch.equal(join(), x * 2)
    cuda.note("sum")
    assert cuda.log == [
        "side waits for main",
        "shared experts on side",
        "dispatch on main",
        "main waits for side",
        "sum on main",
    ]


def test_on_the_cpu_it_is_a_call() -> None:
    x = torch.randn(3)
    assert torch.equal(SideStream(torch.device("cpu")).start(lambda x: x * 2, x)(), x * 2)
