"""A gate of zeros: every kit chooses the experts with the lowest numbers."""

from __future__ import annotations

import pytest
import torch
from kernel_marks import needs_native_kernels

from moe_runtime.config.model import MoEConfig
from moe_runtime.kernels.cpu import loader
from moe_runtime.layers.native_kit import NativeKit
from moe_runtime.layers.torch_kit import TorchKit

KITS = {
    "torch": lambda dtype: TorchKit(dtype, torch.device("cpu")),
    "native": lambda dtype: NativeKit(loader.load(), dtype),
}


@pytest.mark.parametrize("kit", ["torch", pytest.param("native", marks=needs_native_kernels)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_gate_of_zeros_chooses_the_lowest_numbers(kit: str, dtype: torch.dtype, scoring: str) -> None:
    moe = MoEConfig(num_experts=21, top_k=5, intermediate_size=8, scoring=scoring)
    gate = KITS[kit](dtype).gate(moe, torch.zeros(21, 32, dtype=dtype), None, None, None, 0)
    weights_TK, experts_TK, _ = gate(torch.randn(9, 32).to(dtype), 3)
    assert experts_TK.tolist() == [[0, 1, 2, 3, 4]] * 9
    torch.testing.assert_close(weights_TK, torch.full((9, 5), 0.2))
