"""`moe-runtime tune`, with a fake clock instead of a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save

pytest.importorskip("triton")

from moe_runtime.cli import main as cli
from moe_runtime.kernels.triton import tune, tuned
from moe_runtime.kernels.triton.tiles import TILES_16_BIT, Tile


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A configuration without weights: 12 experts, 4 of them for each token."""
    save(make_model("glm4"), tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    return tmp_path / "model"


def test_without_a_gpu_it_says_so_in_one_line(model: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", str(model)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == (
        "moe-runtime: error: device: this machine has no CUDA device; tune measures the GPU that will serve\n"
    )


@pytest.mark.parametrize(
    ("ep_size", "redundant", "num_slots"), [(1, "0", [12]), (2, "3", [6 + 1 + 3]), (3, "2,0,2", [4 + 1, 4 + 1 + 2])]
)
def test_it_measures_the_shapes_of_the_model(
    model: Path, tmp_path: Path, monkeypatch, capsys, ep_size, redundant, num_slots
):
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    asked = []

    def measure_tile(*shape: object) -> Callable[[Tile, int], float]:
        def seconds_of(tile: Tile, num_rows: int) -> float:
            asked.append((*shape[:4], num_rows))
            return 1e-6 if tile == TILES_16_BIT[num_rows % 5] else 1e-3

        return seconds_of

    monkeypatch.setattr(tune, "measure_tile", measure_tile)
    words = ["--ep-size", ep_size, "--dtype", "bfloat16", "--max-num-batched-tokens", 24, "--max-num-seqs", 8]
    words += ["--redundant-experts", redundant]
    assert cli.main(["tune", str(model), *map(str, words)]) == 0
    rows = [1, 2, 4, 8, 16, 32, 64, 128]  # up to 24 tokens of 4 experts each, the next power of two
    assert set(asked) == {(slots, 48, 24, torch.bfloat16, count) for slots in num_slots for count in rows}

    file = tmp_path / "cache" / "tiles-nvidia-h100-80gb-hbm3.json"
    out, err = capsys.readouterr()
    num_found = len(rows) * len(num_slots)
    assert str(file) in err and len(out.splitlines()) == len(json.loads(file.read_text())) == num_found
    tuned.tuned_tiles.cache_clear()
    chosen = {tuned.choose_tile(50, slots, 48, 24, torch.bfloat16, torch.device("cuda", 0)) for slots in num_slots}
    tuned.tuned_tiles.cache_clear()
    assert chosen == {TILES_16_BIT[64 % 5]}


def test_options_are_checked(model: Path, capsys) -> None:
    assert cli.main(["tune", str(model), "--ep-size", "13"]) == 2
    assert "ep_size: 13 is not allowed; it must be at most 12, the model's experts" in capsys.readouterr().err
