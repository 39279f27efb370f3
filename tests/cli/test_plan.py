"""`moe-runtime plan` and `moe-runtime profile`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from places import ROOT
from tiny_models import make_model, save

from moe_runtime.balancer.trace import RoutingTrace
from moe_runtime.cli import main as cli
from moe_runtime.planner.hardware_file import load_hardware

DEEPSEEK = ROOT / "benchmarks" / "planner" / "deepseek-v3.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A configuration without weights: 2 sparse layers, 12 experts of which a token uses 4."""
    folder = tmp_path_factory.mktemp("model")
    save(make_model("glm4"), folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


def write_trace(path: Path, model: str, num_experts: int = 12, num_layers: int = 2, top_k: int = 4) -> Path:
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((50, num_layers, num_experts)), axis=2)[:, :, :top_k].astype(np.uint16)
    layer_ids = tuple(range(1, num_layers + 1))
    step, rank = np.arange(50, dtype=np.int32), np.zeros(50, np.uint16)
    RoutingTrace(experts, step, rank, np.ones(50, bool), num_experts, layer_ids, model, top_k).save(path)
    return path


def plan(capsys, *words: object) -> dict:
    assert cli.main(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_choices_and_a_recommendation(capsys, model):
    found = plan(capsys, model, "--assume", "zipf:1.0", "--ranks", "1,2,4", "--redundant", "0,1", "--batch", "1,8")
    assert [(entry["ranks"], entry["redundant"], entry["batch"]) for entry in found["choices"]] == [
        (ranks, extra, batch) for ranks in (1, 2, 4) for extra in ((0,) if ranks == 1 else (0, 1)) for batch in (1, 8)
    ]
    for entry in found["choices"]:
        assert entry["step_seconds"] == pytest.approx(sum(entry["parts_seconds"].values()))
        assert entry["rank_bytes"] == sum(entry["memory_bytes"].values())
        assert 0 < entry["balancedness"] <= 1
    assert found["recommended"] in found["choices"]


def test_a_trace_names_its_model(capsys, model, tmp_path):
    trace = write_trace(tmp_path / "t.npz", str(model))
    found = plan(capsys, "--trace", trace, "--ranks", "2", "--batch", "4")
    assert found["model"] == str(model) and found["routing"] == "25 recorded decode tokens"


def test_table_and_files(capsys, model, tmp_path):
    words = ["--assume", "uniform", "--hardware", "h800", "--ranks", "32,320", "--batch", "8", "--context-len", "4000"]
    files = ["-o", str(tmp_path / "p.png"), "-o", str(tmp_path / "p.json")]
    assert cli.main(["plan", str(DEEPSEEK), *words, *files]) == 0
    text = capsys.readouterr().out
    assert text.startswith("DeepSeek-V3 on H800, decode with 4000 keys per sequence; routing: uniform")
    assert "Recommended: " in text and len(text.splitlines()) == 7
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "p.json").read_text())["choices"]) == 2


def test_a_cache_of_8_bits_takes_less(capsys, model):
    words = ["plan", str(model), "--assume", "uniform", "--ranks", "1", "--batch", "8", "--json", "--dtype", "bfloat16"]
    found = []
    for name in ("auto", "fp8", "int8"):
        assert cli.main([*words, "--kv-cache-dtype", name]) == 0
        (choice,) = json.loads(capsys.readouterr().out)["choices"]
        found.append(choice["memory_bytes"]["kv_cache"])
    assert found[1] == found[2] and found[1] / found[0] == (16 + 4) / 32, "heads of 16 numbers, and a scale"


def test_nothing_is_fast_enough(capsys, model, tmp_path):
    words = ["plan", str(model), "--assume", "uniform", "--ranks", "2", "--max-step-ms", "1e-6"]
    assert cli.main([*words, "-o", str(tmp_path / "p.png")]) == 0
    assert "None of these fits and is fast enough." in capsys.readouterr().out


MISTAKES = {
    "neither": (["demo"], "trace, assume: exactly one of them must be given"),
    "both": (["demo", "--assume", "uniform", "--trace", "t"], "trace, assume: exactly one of them"),
    "no model": (["--assume", "uniform"], "model: missing; without a trace that names it, it must be given"),
    "assume": (["MODEL", "--assume", "flat"], "assume: 'flat' is not allowed"),
    "hardware": (["MODEL", "--assume", "uniform", "--hardware", "h1"], "hardware: 'h1' is not allowed"),
    "ranks": (["MODEL", "--assume", "uniform", "--ranks", "0"], "ranks: 0 is not allowed"),
    "ranks word": (["MODEL", "--assume", "uniform", "--ranks", "two"], "ranks: 'two' is not allowed"),
    "phase": (["MODEL", "--assume", "uniform", "--phase", "train"], "phase: 'train' is not allowed"),
    "limit": (["MODEL", "--assume", "uniform", "--max-step-ms", "-1"], "max_step_ms: -1.0 is not allowed"),
    "output": (["MODEL", "--assume", "uniform", "-o", "x.svg"], "output: 'x.svg' is not allowed"),
    "no trace": (["--trace", "/nowhere.npz"], "trace: '/nowhere.npz' cannot be read"),
    "other model": (["MODEL", "--trace", "TRACE"], "has 7 experts, but"),
    "kv cache": (["MODEL", "--assume", "uniform", "--kv-cache-dtype", "int4"], "kv_cache_dtype: 'int4' is not allowed"),
    "dtype": (["DEEPSEEK", "--assume", "uniform"], "dtype: 'float8' is not in the hardware profile"),
    "shape": (["/nowhere.json", "--assume", "uniform"], "model: '/nowhere.json' cannot be read"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(capsys, model, tmp_path, case):
    words, message = MISTAKES[case]
    trace = write_trace(tmp_path / "t.npz", "m", num_experts=7) if "TRACE" in words else None
    names = {"MODEL": str(model), "DEEPSEEK": str(DEEPSEEK), "TRACE": str(trace)}
    assert cli.main(["plan", *(names.get(word, word) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_profile_writes_what_plan_reads(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("moe_runtime.planner.measure.measure", lambda name, say: load_hardware("cpu"))
    assert cli.main(["profile", "-o", str(tmp_path / "here.yaml")]) == 0
    assert load_hardware(str(tmp_path / "here.yaml")) == load_hardware("cpu")
    assert cli.main(["profile", "-o", "here.txt"]) == 2
    assert "output: 'here.txt' is not allowed" in capsys.readouterr().err
