"""The memory budget of the ranks before weights are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fakes import model_config
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_model, save

from moe_runtime import build
from moe_runtime.config.engine import EngineConfig
from moe_runtime.layers import kv_cache
from moe_runtime.memory import budget as budgets
from moe_runtime.memory.budget import Budget, check_budget, has_native_weights, plan_budget
from moe_runtime.memory.initial_placement import slots_per_rank
from moe_runtime.memory.model_size import page_bytes, weight_bytes
from moe_runtime.models.registry import read_model_config

MODEL = model_config()
BIG = dataclasses.replace(MODEL, vocab_size=10**6, hidden_size=4096)  # 33 GB in float32, nearly all on every rank


@given(
    redundant=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    data=st.data(),
    free=st.integers(0, 10**9),
    max_num_seqs=st.integers(1, 64),
    max_model_len=st.integers(1, 64),
    kv_cache_memory_bytes=st.none() | st.integers(6144, 10**6),  # a sequence of 64 tokens takes 6144
)
def test_what_is_planned_adds_up(redundant, data, free, max_num_seqs, max_model_len, kv_cache_memory_bytes):
    ep_size = len(redundant)
    local_ranks = data.draw(st.integers(1, ep_size))
    engine = EngineConfig(
        "m",
        ep_size=ep_size,
        redundant_experts=redundant if ep_size > 1 else 0,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
    )
    budget = plan_budget(engine, MODEL, local_ranks, free)
    num_slots = slots_per_rank(engine, MODEL, ep_size)[:local_ranks]
    assert tuple(rank.num_slots for rank in budget.ranks) == num_slots and min(num_slots) >= 4 / ep_size
    for rank in budget.ranks:
        assert rank.weights == weight_bytes(MODEL, "float32", rank.num_slots, native=has_native_weights("auto"))
        assert rank.kv_cache == rank.num_pages[0] * page_bytes(MODEL, 16, "float32")[0]
    assert len({(rank.dense, rank.kv_cache, rank.buffers) for rank in budget.ranks}) == 1
    assert budget.largest.num_slots == max(num_slots) and budget.largest.total == max(r.total for r in budget.ranks)
    assert budget.total == sum(rank.weights + rank.kv_cache + rank.buffers for rank in budget.ranks)
    assert budget.left == free - budget.total and budget.fits == (budget.left >= 0)
    assert max_model_len <= rank.num_pages[0] * 16 <= max_num_seqs * (max_model_len + 15), "one sequence, at most all"


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_cache_memory_bytes": 100_000}, {"max_num_seqs": 2}, {"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"}],
)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_planned_pages_are_those_that_ranks_choose(tmp_path: Path, monkeypatch, options, num_ranks) -> None:
    model = read_model_config(save(make_model("glm4"), tmp_path))
    engine = EngineConfig("m", ep_size=num_ranks, redundant_experts=range(num_ranks), **options)
    free = 4_000_000
    budget = plan_budget(engine, model, num_ranks, free)
    after_loading = free - sum(rank.weights for rank in budget.ranks)
    monkeypatch.setattr(kv_cache, "available_host_memory", lambda: after_loading)
    dtype = options.get("kv_cache_dtype", options.get("dtype", "float32"))
    chosen = kv_cache.choose_num_pages(engine, model, dtype, torch.device("cpu"), num_ranks)
    assert {rank.num_pages for rank in budget.ranks} == {chosen}


def test_a_cache_that_holds_no_whole_sequence_is_refused_before_loading() -> None:
    engine = EngineConfig("m", device="cpu", kv_cache_memory_bytes=6143)
    message = r"^kv_cache_memory_bytes: 6143 bytes per rank do not hold .* max_model_len 64; give at least 6144 bytes"
    with pytest.raises(ValueError, match=message):
        check_budget(engine, MODEL, 1)


def test_a_model_that_fits_says_what_is_left(monkeypatch) -> None:
    monkeypatch.setattr(budgets, "available_host_memory", lambda: 5 * 10**9)
    engine = EngineConfig("m", ep_size=2, device="cpu", max_num_batched_tokens=64, kv_cache_memory_bytes=10**6)
    text = str(check_budget(engine, MODEL, 2))
    assert text.startswith("2 ranks, each with weights 0.00 GB, KV cache 0.00 GB (256 pages), buffers 0.12 GB: ")
    assert text.endswith("0.24 GB of 5.00 GB free, 4.76 GB left")
    unequal = dataclasses.replace(engine, redundant_experts=(0, 1))
    assert str(check_budget(unequal, MODEL, 2)).startswith("2 ranks, the largest with weights 0.00 GB, KV cache ")


def test_a_model_that_does_not_fit_is_refused_with_the_figures(monkeypatch) -> None:
    monkeypatch.setattr(budgets, "available_host_memory", lambda: 40 * 10**9)
    engine = EngineConfig("big", ep_size=2, device="cpu")
    assert check_budget(engine, BIG, 1).fits, "the other rank is elsewhere"
    message = (
        r"^model: 'big' does not fit here: 2 ranks, each with weights 32\.\d GB, KV cache \d\.\d+ GB \(\d+ pages\), "
        r"buffers \d\.\d+ GB: \d+\.\d GB, but only 40\.0 GB are free\. Reduce max_model_len"
    )
    with pytest.raises(ValueError, match=message):
        check_budget(engine, BIG, 2)


def test_nothing_is_read_or_started_for_a_model_that_does_not_fit(tmp_path: Path, monkeypatch) -> None:
    path = save(make_model("qwen3"), tmp_path)
    for file in path.glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(budgets, "available_host_memory", lambda: 1000)

    def never(*args):
        raise AssertionError

    engine = EngineConfig(str(path), device="cpu", skip_tokenizer_init=True)
    with pytest.raises(ValueError, match=r"does not fit here: 1 rank with weights .*, but only 0\.00 GB are free"):
        build.build_engine(engine, never)


def test_ranks_on_gpus_are_not_refused_here(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(budgets, "available_host_memory", lambda: 0)
    budget = check_budget(EngineConfig("big", device="cuda"), BIG, 1)
    assert budget.fits is None and budget.left is None
    assert str(budget).endswith(" GB of GPU memory")
    monkeypatch.setattr(budgets, "CUDA_DRIVER", tmp_path / "driver")
    with pytest.raises(ValueError, match="does not fit"):
        check_budget(EngineConfig("big"), BIG, 1)
    (tmp_path / "driver").touch()
    assert check_budget(EngineConfig("big"), BIG, 1).fits is None


def test_free_memory_in_a_control_group(monkeypatch, tmp_path: Path) -> None:
    """The limit less what is used, of which files that were read can be given back."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemAvailable:  800 kB\n")
    monkeypatch.setattr(budgets, "MEMINFO", meminfo)
    monkeypatch.setattr(budgets, "CGROUP", tmp_path)
    assert budgets.available_host_memory() == 800 * 1024
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 4000\ninactive_file 2500\nactive_file 500\n")
    for limit, free in (("max", 800 * 1024), ("7000", 5000), ("1000000", 800 * 1024), ("100", 0)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert budgets.available_host_memory() == free


def test_readable_bytes() -> None:
    assert [budgets.gigabytes(n) for n in (4e6, 1.344e9, 22.44e9)] == ["0.00 GB", "1.34 GB", "22.4 GB"]
    assert Budget(plan_budget(EngineConfig("m"), MODEL, 1, None).ranks, None).fits is None


def test_captured_decode_steps_count_on_gpus_alone(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(budgets, "CUDA_DRIVER", tmp_path / "none")
    graphs = [budgets.graph_bytes(EngineConfig("m", ep_size=ranks, max_num_seqs=100), MODEL) for ranks in (1, 2, 4)]
    assert 0 < graphs[1] < graphs[2] and graphs[0] > 0
    assert budgets.graph_bytes(EngineConfig("m", enforce_eager=True), MODEL) == 0

    def buffers(**options: object) -> int:
        return plan_budget(EngineConfig("m", max_num_seqs=100, **options), MODEL, 1, None).largest.buffers

    assert buffers(device="cuda") - buffers(device="cuda", enforce_eager=True) == graphs[0]
    # Where no GPU may be, fewer rows are between dispatch and combine at a time.
    assert buffers(device="auto") == buffers(device="cpu") < buffers(device="cuda", enforce_eager=True)
    # Rows that queue are all there before they are summed.
    assert buffers(device="cpu", capacity_factor=1.0) == buffers(device="cuda", enforce_eager=True)
    assert buffers(device="cpu", capacity_factor=1.0, overflow="drop") == buffers(device="cpu")
