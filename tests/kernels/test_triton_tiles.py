"""Which tile a product takes: the model's choice, the tuner's file, and which of them wins."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from moe_runtime.kernels.triton import tiles, tune, tuned
from moe_runtime.kernels.triton.tiles import CHIPS, Tile
from moe_runtime.types.weight_format import Code, Scale, WeightFormat

GPU = torch.device("cuda", 0)
LAYERS = {"Mixtral": (8, 2, 4096, 14336), "Qwen3-30B": (128, 8, 2048, 768), "DeepSeek-V3": (256, 8, 7168, 2048)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    tuned.tuned_tiles.cache_clear()
    yield GPU
    tuned.tuned_tiles.cache_clear()


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("layer", LAYERS)
def test_few_rows_take_small_tiles_and_many_take_large_ones(layer, chip):
    num_slots, top_k, hidden, intermediate = LAYERS[layer]

    def rows_of(tokens):
        return tiles.model_tile(tokens * top_k, num_slots, hidden, intermediate, torch.bfloat16, chip).block_m

    sizes = [rows_of(tokens) for tokens in (1, 8, 64, 512, 4096, 16384)]
    assert sizes == sorted(sizes) and sizes[0] == 16 and sizes[-1] == 128


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_quantised_weights_take_no_tile_that_would_spill(chip):
    def rows_of(num_rows):
        tile = tiles.linear_tile(num_rows, 4096, 2048, torch.bfloat16, 4, chip)
        assert tile.block_n <= tiles.MAX_QUANTIZED_N
        return tile.block_m

    sizes = [rows_of(num_rows) for num_rows in (1, 16, 256, 16384)]
    assert sizes == sorted(sizes) and sizes[0] == 16 and sizes[-1] == 128
    layer = (1 << 14, 8, 4096, 14336, torch.bfloat16, chip)
    assert tiles.model_tile(*layer, 4).block_n <= tiles.MAX_QUANTIZED_N
    few = (tiles.TILES_16_BIT[0], 8, 8, 4096, 14336, 2, chip)
    assert tiles.expected_seconds(*few, 4) < tiles.expected_seconds(*few), "fewer bytes are read in less time"


@given(
    st.integers(1, 1 << 20),
    st.integers(1, 512),
    st.integers(1, 16384),
    st.integers(1, 16384),
    st.sampled_from(DTYPES),
    st.sampled_from(list(CHIPS.values())),
)
def test_the_choice_is_the_fastest_that_fits(num_rows, num_slots, hidden, intermediate, dtype, chip):
    chosen = tiles.model_tile(num_rows, num_slots, hidden, intermediate, dtype, chip)
    assert chosen.shared_bytes(dtype.itemsize) <= chip.shared_bytes
    shape = (num_rows, num_slots, hidden, intermediate, dtype.itemsize, chip)
    times = [tiles.expected_seconds(tile, *shape) for tile in tiles.tiles_that_fit(dtype, chip)]
    assert tiles.expected_seconds(chosen, *shape) == min(times) > 0


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_the_model_is_never_faster_than_memory(chip):
    weights = 128 * 3 * 2048 * 768 * 2
    for tile in tiles.TILES_16_BIT:
        assert tiles.expected_seconds(tile, 1 << 16, 128, 2048, 768, 2, chip) >= weights / chip.bytes_per_s


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_chip_can_run_the_invariant_tile(dtype):
    assert all(tiles.invariant_tile(dtype) in tiles.tiles_that_fit(dtype, chip) for chip in CHIPS.values())


def test_rows_count_up_to_a_power_of_two():
    assert [tiles.rows_bucket(count) for count in (0, 1, 2, 3, 4, 5, 1000, 1024, 1025)] == [
        *(1, 1, 2, 4, 4, 8, 1024, 1024, 2048)
    ]


def test_a_dtype_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match=r"dtype: torch\.float64 is not allowed"):
        tiles.shipped_tiles(torch.float64)


def test_tuning_keeps_the_fastest_and_serving_uses_it(h100, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path))
    shape = (16, 64, 48)
    slow = tuned.choose_tile(100, *shape, torch.bfloat16, h100)
    asked = []

    def seconds_of(tile, num_rows):
        asked.append((tile, num_rows))
        return 1e-3 if tile == tiles.TILES_16_BIT[2] else 2e-3

    found = tune.tune(*shape, torch.bfloat16, [100, 120, 9], device=h100, seconds_of=seconds_of)
    assert {count for _, count in asked} == {16, 128} and len(asked) == 2 * len(tiles.TILES_16_BIT)
    assert set(found.values()) == {tiles.TILES_16_BIT[2]} and slow != tiles.TILES_16_BIT[2]
    assert list(tmp_path.iterdir()) == [tmp_path / "tiles-nvidia-h100-80gb-hbm3.json"]

    tuned.tuned_tiles.cache_clear()  # a process that starts later
    assert tuned.choose_tile(100, *shape, torch.bfloat16, h100) == tiles.TILES_16_BIT[2]
    assert tuned.choose_tile(100, *shape, torch.float16, h100) == slow
    mxfp4 = WeightFormat(Code.FP4, Scale.E8M0, 32)
    assert tuned.choose_tile(100, *shape, torch.bfloat16, h100, mxfp4) != tiles.TILES_16_BIT[2]

    tune.tune(*shape, torch.bfloat16, [1], device=h100, seconds_of=lambda tile, num_rows: float(tile.block_n))
    kept = tuned.load_tiles(tmp_path / "tiles-nvidia-h100-80gb-hbm3.json")
    assert len(kept) == 3 and set(found) < set(kept)


def test_only_gpus_are_tuned():
    with pytest.raises(ValueError, match="device: cpu is not allowed"):
        tune.tune(4, 8, 8, torch.float32, [1], device=torch.device("cpu"))


def test_without_a_gpu_nothing_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path / "none"))
    device = torch.device("cpu")
    assert tuned.choose_tile(1, 8, 64, 64, torch.float32, device) == tiles.TILES_32_BIT[0]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"a": [1, 2]}', '{"a": [16, 64, 64, 4, "4"]}', '{"a": [16, 64, 64, 0, 4]}', '{"a": 3}']
)
def test_a_broken_file_is_named(tmp_path, text):
    file = tmp_path / "tiles-x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"tiles-x\.json: not a file of tuned tiles"):
        tuned.load_tiles(file)


def test_what_is_saved_is_read(tmp_path):
    saved = {"b": Tile(16, 64, 128, 4, 4), "a": tiles.TILES_16_BIT[-1]}
    file = tmp_path / "new" / "tiles.json"
    tuned.save_tiles(file, saved)
    assert tuned.load_tiles(file) == saved
    assert list(json.loads(file.read_text())) == ["a", "b"] and list(file.parent.iterdir()) == [file]
