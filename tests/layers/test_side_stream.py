"""Work on the side stream, on a fake GPU that only records it: the required order, and work that need not wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatched
from moe_runtime.layers import moe
from moe_runtime.layers.batch import Batch
from moe_runtime.layers.side_stream import SideStream, side_stream


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    side_stream.cache_clear()
    monkeypatch.setattr(moe, "SideStream", lambda device: SideStream(torch.device("cuda", 0)))
    yield FakeCuda(monkeypatch)
    side_stream.cache_clear()  # other tests' GPUs are none of these


class NotingParts:
    """Every part of a sparse layer but the shared experts; a step that leaves its rows as they are."""

    num_slots = 1
    nbytes = 0

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def gate(self, x_TD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.cuda.note("gate")
        return torch.ones(len(x_TD), 1), torch.zeros(len(x_TD), 1, dtype=torch.int64), torch.zeros(len(x_TD), 1)

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, tokens_per_rank: list[int]) -> Dispatched:
        self.cuda.note("dispatch")
        return Dispatched(x_TD, torch.arange(len(x_TD)), torch.tensor([len(x_TD)]), None)

    def __call__(self, x_ND: Tensor, *_: Any) -> Tensor:
        self.cuda.note("experts")
        return x_ND.clone()

    def combine(self, y_RD: Tensor, *_: Any) -> Tensor:
        self.cuda.note("combine")
        return y_RD

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        self.cuda.note("norm")
        return x_TD, residual_TD


def test_shared_experts_run_beside_dispatch_and_combine(cuda: FakeCuda) -> None:
    parts = NotingParts(cuda)

    def shared(x_TD: Tensor) -> Tensor:
        cuda.note("shared experts")
        return 2 * x_TD

    shared.nbytes = 0
    layer = moe.MoELayer(parts.gate, torch.tensor([0]), parts, shared, parts, {"local": parts})
    batch = Batch(*[torch.empty(0)] * 2, pages=(), num_decode=0, dispatcher="local", tokens_per_rank=[5])
    for _ in range(2):  # the second layer's side work follows the first one's
        x_TD = torch.randn(5, 3)
        cuda.note("rows")
        assert torch.equal(layer(x_TD.clone(), torch.zeros(5, 3), batch)[0], 3 * x_TD)
        before = cuda.before
        assert {"rows", "gate"} <= before["shared experts"], "they would read rows that are not there yet"
        assert {"shared experts", "combine"} <= before["norm"], "their sum would be taken too early"
        beside = {"dispatch", "experts", "combine"}
        assert not beside & (before["shared experts"] - before["rows"]), "they wait for what they could run beside"
        assert not any("shared experts" in before[work] - before["rows"] for work in beside), "they are waited for"


def test_on_the_cpu_it_is_a_call() -> None:
    x = torch.randn(3)
    assert torch.equal(SideStream(torch.device("cpu")).start(lambda x: x * 2, x)(), x * 2)
