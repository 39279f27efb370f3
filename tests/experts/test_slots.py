"""Experts in slots: weights read in pieces compute as a whole, and checksums distinguish any two contents."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_runtime.experts.parts import CHUNK_WORDS, checksum
from moe_runtime.experts.slots import ExpertSlots
from moe_runtime.kernels.forms import INVARIANT, USUAL, Forms

HIDDEN, INNER = 24, 10


@pytest.mark.parametrize("forms", [USUAL, INVARIANT], ids=["usual", "invariant"])
def test_slots_compute_the_experts_that_were_loaded(forms: Forms) -> None:
    slots = ExpertSlots(3, HIDDEN, INNER, torch.float32, torch.device("cpu"), forms)
    assert slots.num_slots == 3 and slots.nbytes == 3 * 3 * HIDDEN * INNER * 4
    for tensor in (slots.w13_SGD, slots.w2_SDF):
        tensor.fill_(float("nan"))  # what no expert was loaded into
    experts = {
        slot: {"gate": torch.randn(INNER, HIDDEN), "up": torch.randn(INNER, HIDDEN), "down": torch.randn(HIDDEN, INNER)}
        for slot in (2, 0)
    }
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
        expected = w["down"] @ (F.silu(w["gate"] @ x) * (w["up"] @ x))
        assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()


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
