"""Experts in slots: weights read in pieces compute as a whole, and checksums distinguish any two contents."""

from __future__ import annotations

import pytest
import torch
from quantized_matrices import FORMATS, name_of, random_matrix

from moe_runtime.experts.parts import CHUNK_WORDS, ExpertPart, checksum
from moe_runtime.experts.slots import ExpertSlots
from moe_runtime.kernels.forms import INVARIANT, USUAL, Forms
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU
from moe_runtime.types.weight_format import BlockFormats, WeightFormat

HIDDEN, INNER = 24, 10

SHAPES: dict[ExpertPart, tuple[int, ...]] = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
BIASES: dict[ExpertPart, tuple[int, ...]] = {"gate_bias": (INNER,), "up_bias": (INNER,), "down_bias": (HIDDEN,)}


@pytest.mark.parametrize("forms", [USUAL, INVARIANT], ids=["usual", "invariant"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("swiglu", [PLAIN, SwiGLU(alpha=1.702, limit=2.0, offset=1.0)], ids=["plain", "clamped"])
def test_slots_compute_the_experts_that_were_loaded(swiglu: SwiGLU, has_bias: bool, forms: Forms) -> None:
    slots = ExpertSlots(3, HIDDEN, INNER, torch.float32, torch.device("cpu"), forms, swiglu, has_bias)
    biases = 3 * (2 * INNER + HIDDEN) if has_bias else 0
    assert slots.num_slots == 3 and slots.nbytes == (3 * 3 * HIDDEN * INNER + biases) * 4
    assert [int(tensor.count_nonzero()) for tensor in slots.stored(1)[2:]] == [0, 0] * has_bias
    for slot in range(3):
        for tensor in slots.stored(slot):
            tensor.fill_(float("nan"))  # what no expert was loaded into
    shapes = SHAPES | BIASES if has_bias else SHAPES
    experts = {slot: {part: torch.randn(shape) for part, shape in shapes.items()} for slot in (2, 0)}
    for slot, parts in experts.items():
        for part, rows in parts.items():
            cut = int(torch.randint(1, len(rows), ()))
            slots.put(slot, part, cut, rows[cut:])
            slots.put(slot, part, 0, rows[:cut])
    assert all(tensor.isnan().all() for tensor in slots.stored(1))
    x_ND, row_R, counts_S = torch.randn(4, HIDDEN), torch.tensor([3, 0, 0, 2, 1]), torch.tensor([2, 0, 3])
    actual = slots(x_ND, row_R, counts_S)
    for y, row, slot in zip(actual, row_R.tolist(), [0, 0, 2, 2, 2], strict=True):
        w, x = experts[slot], x_ND[row]
        gate, up = (w[part] @ x + w.get(f"{part}_bias", torch.zeros(())) for part in ("gate", "up"))
        gate, up = gate.clamp(max=swiglu.limit), up.clamp(-swiglu.limit, swiglu.limit)
        product = gate * torch.sigmoid(swiglu.alpha * gate) * (up + swiglu.offset)
        expected = w["down"] @ product + w.get("down_bias", torch.zeros(()))
        assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_quantised_slots_compute_the_experts_that_were_loaded(format: WeightFormat) -> None:
    slots = ExpertSlots(
        3, HIDDEN, INNER, torch.float32, torch.device("cpu"), has_bias=True, formats=BlockFormats(format, format)
    )
    plain = ExpertSlots(3, HIDDEN, INNER, torch.float32, torch.device("cpu"), has_bias=True)
    weights = 3 * (format.nbytes(2 * INNER, HIDDEN) + format.nbytes(HIDDEN, INNER))
    assert slots.formats == BlockFormats(format, format) and slots.nbytes == weights + 3 * (2 * INNER + HIDDEN) * 4
    for slot in (2, 0):
        for part, shape in SHAPES.items():
            rows, cut = random_matrix(format, *shape), int(torch.randint(1, shape[0], ()))
            slots.put(slot, part, cut, rows.rows(slice(cut, None)))
            slots.put(slot, part, 0, rows.rows(slice(cut)))
            plain.put(slot, part, 0, rows.dequantize())
        for part, bias in {part: torch.randn(shape) for part, shape in BIASES.items()}.items():
            slots.put(slot, part, 0, bias)
            plain.put(slot, part, 0, bias)
    x_ND, row_R, counts_S = torch.randn(4, HIDDEN), torch.tensor([3, 0, 0, 2, 1]), torch.tensor([2, 0, 3])
    assert torch.equal(slots(x_ND, row_R, counts_S), plain(x_ND, row_R, counts_S))


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_what_is_stored_of_a_quantised_expert_is_all_that_counts(format: WeightFormat) -> None:
    """A copy of what is stored computes the same, and its checksum changes with each of its tensors."""
    rooms = [
        ExpertSlots(2, HIDDEN, INNER, torch.float32, torch.device("cpu"), formats=BlockFormats(format, format))
        for _ in "ab"
    ]
    for part, shape in SHAPES.items():
        rooms[0].put(1, part, 0, random_matrix(format, *shape))
    stored = rooms[0].stored(1)
    for tensor, source in zip(rooms[1].stored(0), stored, strict=True):
        tensor.copy_(source)
    x_ND = torch.randn(4, HIDDEN)
    first, second = rooms[0](x_ND, None, torch.tensor([0, 4])), rooms[1](x_ND, None, torch.tensor([4, 0]))
    assert torch.equal(first, second) and first.isfinite().all()
    before = checksum(stored)
    assert checksum(rooms[1].stored(0)) == before
    for tensor in stored:
        tensor.view(torch.uint8)[-1, ...] ^= 1
        assert checksum(stored) != before
        before = checksum(stored)


def test_biases_need_room() -> None:
    slots = ExpertSlots(1, HIDDEN, INNER, torch.float32, torch.device("cpu"))
    with pytest.raises(AssertionError, match="up_bias: no room for biases"):
        slots.put(0, "up_bias", 0, torch.randn(INNER))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_checksum_is_that_of_the_content(dtype: torch.dtype) -> None:
    tensors = [torch.randint(0, 200, (33, 5)).to(dtype), torch.randint(0, 200, (7,)).to(dtype)]
    before = checksum(tensors)
    assert before == checksum([tensor.clone() for tensor in tensors])
    for tensor in tensors:
        flat = tensor.view(-1)
        for place in torch.randint(len(flat), (20,)).tolist():
            kept = flat[place].clone()
            flat[place] += 1
            assert checksum(tensors) != before
            flat[place] = kept
    assert checksum(tensors) == before
    assert checksum(tensors[::-1]) != before
    assert checksum([tensors[0][1:], tensors[1]]) != before


def test_a_checksum_of_several_chunks_sees_where_words_are() -> None:
    words = torch.zeros(CHUNK_WORDS + 3, dtype=torch.int64)
    sums = set()
    for place in (0, 1, CHUNK_WORDS - 1, CHUNK_WORDS, CHUNK_WORDS + 2):
        words[place] = 7
        sums.add(checksum([words]))
        words[place] = 0
    assert len(sums) == 5
