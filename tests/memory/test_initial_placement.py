"""The initial placement of an engine, on ranks that may have different numbers of slots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fakes import model_config

from moe_runtime.balancer.placement import Placement
from moe_runtime.config.engine import EngineConfig
from moe_runtime.memory.initial_placement import initial_placement, slots_per_rank

MODEL = model_config()  # 4 experts in layers 1 and 2


def config(redundant: object, placement: Path | None = None, ep_size: int = 2) -> EngineConfig:
    file = None if placement is None else str(placement)
    return EngineConfig("m", ep_size=ep_size, redundant_experts=redundant, placement=file)


@pytest.mark.parametrize(
    ("ep_size", "redundant", "expected"),
    [(1, 0, (4,)), (1, [0], (4,)), (2, 1, (4, 4)), (2, "1,0", (4, 3)), (3, (0, 2, 1), (3, 5, 4))],
)
def test_each_rank_has_its_share_its_redundant_slots_and_a_shadow(ep_size, redundant, expected) -> None:
    assert slots_per_rank(config(redundant, ep_size=ep_size), MODEL, ep_size) == expected


def test_without_a_file_experts_are_even_in_the_slots_of_each_rank() -> None:
    placement = initial_placement(config([0, 2]), MODEL, 2)
    assert placement.slots.tolist() == [[[0, 1, -1, -1, -1], [2, 3, -1, -1, -1]]] * 2


def test_a_saved_placement_is_where_the_next_engine_begins(tmp_path: Path) -> None:
    slots = [[[0, -1, 3, 1, 2], [-1, 2, 3, -1, -1]], [[-1, 2, 3, -1, -1], [1, 0, -1, -1, -1]]]
    saved = Placement(np.array(slots), 4, MODEL.moe_layers, 7)
    saved.save(tmp_path / "p.json")
    assert initial_placement(config([2, 0], tmp_path / "p.json"), MODEL, 2) == saved
    wider = initial_placement(config([2, 3], tmp_path / "p.json"), MODEL, 2)
    assert wider.max_slots == 6 and np.array_equal(wider.slots[:, :, :5], saved.slots)
    saved.in_slots(6).save(tmp_path / "p.json")
    assert initial_placement(config([2, 0], tmp_path / "p.json"), MODEL, 2) == saved


def test_experts_in_slots_that_a_rank_lacks_close_up(tmp_path: Path) -> None:
    slots = np.array([[[0, 1, 2, -1], [-1, -1, 2, 3]], [[0, 1, 3, -1], [2, 3, -1, -1]]])
    Placement(slots, 4, MODEL.moe_layers).save(tmp_path / "p.json")
    found = initial_placement(config([1, 0], tmp_path / "p.json"), MODEL, 2)
    assert found.slots.tolist() == [[[0, 1, 2, -1], [2, 3, -1, -1]], [[0, 1, 3, -1], [2, 3, -1, -1]]]


@pytest.mark.parametrize(
    ("redundant", "message"),
    [
        ([0, 1], r"p.json has 4 experts on rank 0; with redundant_experts \(0, 1\) it may have 2$"),
        ([2, 0], r"p.json has 3 experts on rank 1; with redundant_experts \(2, 0\) it may have 2$"),
        (1, r"p.json has 4 experts on rank 0; with redundant_experts 1 it may have 3$"),
    ],
)
def test_a_file_with_too_many_experts_on_a_rank_is_refused(tmp_path: Path, redundant: object, message: str) -> None:
    slots = np.array([[[0, 1, 2, 3], [0, -1, 2, 3]], [[0, 1, 2, -1], [2, 3, -1, -1]]])
    Placement(slots, 4, MODEL.moe_layers).save(tmp_path / "p.json")
    assert initial_placement(config([2, 1], tmp_path / "p.json"), MODEL, 2).slots.shape == (2, 2, 5)
    with pytest.raises(ValueError, match=message):
        initial_placement(config(redundant, tmp_path / "p.json"), MODEL, 2)
