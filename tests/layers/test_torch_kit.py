"""Parts of the torch kit with quantised weights, against parts that hold the same weights dequantised."""

from __future__ import annotations

import pytest
import torch
from quantized_matrices import FORMATS, name_of, random_matrix

from moe_runtime.config.model import MoEConfig
from moe_runtime.experts.parts import ExpertPart
from moe_runtime.layers.torch_kit import TorchKit
from moe_runtime.types.weight_format import DENSE, BlockFormats, WeightFormat

HIDDEN, INNER = 40, 26
SHAPES: dict[ExpertPart, tuple[int, int]] = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=name_of)
EACH_KIT = pytest.mark.parametrize(
    "kit",
    [TorchKit(torch.bfloat16, torch.device("cpu")), TorchKit(torch.float32, torch.device("cpu"), batch_invariant=True)],
    ids=["bfloat16", "invariant"],
)


@EACH_KIT
@EACH_FORMAT
def test_linear_and_head(kit: TorchKit, format: WeightFormat) -> None:
    weight, bias = random_matrix(format, 30, HIDDEN), torch.randn(30, dtype=kit.dtype)
    x = torch.randn(5, HIDDEN, dtype=kit.dtype)
    quantized, dense = kit.linear(30, HIDDEN, bias, format), kit.linear(30, HIDDEN, bias)
    quantized.put(11, weight.rows(slice(11, None)))
    quantized.put(0, weight.rows(slice(11)))
    dense.put(0, weight.dequantize().to(kit.dtype))
    assert torch.equal(quantized(x), dense(x))
    assert quantized.nbytes == format.nbytes(30, HIDDEN) + bias.nbytes

    head, rows = kit.head(30, HIDDEN, format)
    rows.put(0, weight)
    logits = head(x)
    assert logits.dtype == torch.float32 and torch.equal(logits, kit.forms.linear(x, dense.weight, None).float())
    with pytest.raises(AssertionError, match="a quantised head shares no weight"):
        head.tied_embedding()


@EACH_KIT
@EACH_FORMAT
def test_mlp(kit: TorchKit, format: WeightFormat) -> None:
    gate_D = torch.randn(HIDDEN, dtype=kit.dtype)
    quantized, dense = (kit.mlp(HIDDEN, INNER, gate_D, each) for each in (BlockFormats(format, format), DENSE))
    for part, shape in SHAPES.items():
        weight = random_matrix(format, *shape)
        quantized.put(0, part, 0, weight)
        dense.put(0, part, 0, weight.dequantize().to(kit.dtype))
    x = torch.randn(5, HIDDEN, dtype=kit.dtype)
    assert torch.equal(quantized(x), dense(x)) and dense(x).isfinite().all()
    assert quantized.nbytes == format.nbytes(2 * INNER, HIDDEN) + format.nbytes(HIDDEN, INNER) + gate_D.nbytes


@EACH_KIT
@EACH_FORMAT
def test_experts(kit: TorchKit, format: WeightFormat) -> None:
    moe = MoEConfig(num_experts=3, top_k=2, intermediate_size=INNER)
    quantized, dense = (kit.experts(3, HIDDEN, moe, each) for each in (BlockFormats(format, format), DENSE))
    for slot in range(3):
        for part, shape in SHAPES.items():
            weight = random_matrix(format, *shape)
            quantized.put(slot, part, 0, weight)
            dense.put(slot, part, 0, weight.dequantize().to(kit.dtype))
    x_ND, row_R = torch.randn(4, HIDDEN, dtype=kit.dtype), torch.randint(4, (6,))
    counts_S = torch.tensor([1, 3, 2])
    assert torch.equal(quantized(x_ND, row_R, counts_S), dense(x_ND, row_R, counts_S))
    assert quantized.formats == BlockFormats(format, format) and quantized.num_slots == 3
