"""`moe-runtime inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import make_model, save

from moe_runtime.cli import inspect as cli_inspect
from moe_runtime.cli import main as cli
from moe_runtime.config.engine import EngineConfig
from moe_runtime.memory import budget
from moe_runtime.memory import model_size as size
from moe_runtime.memory.budget import has_native_weights, plan_budget
from moe_runtime.memory.initial_placement import slots_per_rank
from moe_runtime.models.registry import read_model_config


@pytest.fixture
def path(tmp_path: Path, monkeypatch) -> Path:
    """A configuration without weights, on a host with 200 MB free."""
    save(make_model("glm4"), tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(cli_inspect, "available_host_memory", lambda: 230_000_000)
    monkeypatch.setattr(budget, "CUDA_DRIVER", tmp_path / "none")
    return tmp_path


def inspect(capsys, *words: object) -> dict:
    assert cli.main(["inspect", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures_are_those_of_the_model(path, capsys):
    found = inspect(capsys, path, "--batch-size", "1,5", "--ep-size", "1,3", "--dtype", "bfloat16")
    model = read_model_config(path)
    count = size.count_parameters(model)
    assert (found["family"], found["dtype"], found["available_bytes"]) == ("glm4_moe", "bfloat16", 230_000_000)
    assert found["parameters"] == {
        "total": count.total,
        "active": count.active,
        "dense": count.dense,
        "expert": count.expert,
    }
    assert found["layers"] == {"total": 3, "sparse": 2}
    assert [row["bytes_per_step"] for row in found["decode"]] == [
        size.decode_bytes(model, "bfloat16", batch_size, native=has_native_weights("cpu")) for batch_size in (1, 5)
    ]
    one, three = found["ranks"]
    slots = [slots_per_rank(EngineConfig("m", ep_size=ranks), model, ranks) for ranks in (1, 3)]
    assert [one["slots_per_layer"], three["slots_per_layer"]] == [count[0] for count in slots]
    assert one["dense_bytes"] == three["dense_bytes"] == size.dense_bytes(model, "bfloat16", has_native_weights("cpu"))
    planned = plan_budget(EngineConfig("m", ep_size=3, dtype="bfloat16"), model, 3, 230_000_000)
    assert (three["rank_bytes"], three["all_ranks_bytes"]) == (planned.largest.total, planned.total)
    assert one["fits"] and not three["fits"], "three processes alone take more than 230 MB"


def test_engine_options_count(path, capsys):
    words = (path, "--max-model-len", 40, "--max-num-seqs", 3, "--block-size", 8, "--ep-size", 1)
    (rank,) = inspect(capsys, *words)["ranks"]
    (page,) = size.page_bytes(read_model_config(path), 8, "float32")
    assert rank["kv_cache_bytes"] == 3 * 5 * page
    (rank,) = inspect(capsys, *words, "--kv-cache-memory-bytes", 7 * page)["ranks"]
    assert rank["kv_cache_bytes"] == 7 * page
    found = inspect(capsys, *words, "--kv-cache-dtype", "int8")
    (page,) = size.page_bytes(read_model_config(path), 8, "int8")
    assert found["ranks"][0]["kv_cache_bytes"] == 3 * 5 * page
    assert (found["kv_cache_dtype"], found["kv_bytes_per_token"]) == ("int8", page // 8)
    more, usual = (
        inspect(capsys, path, "--ep-size", 2, *extra)["ranks"][0] for extra in (("--redundant-experts", 3), ())
    )
    assert more["slots_per_layer"] == usual["slots_per_layer"] + 3


@pytest.mark.parametrize("words", [["--ep-size", "2"], []])
def test_ranks_with_redundant_experts_of_their_own(path, capsys, words):
    words = [path, "--redundant-experts", "3,0", *words]
    model = read_model_config(path)
    (found,) = inspect(capsys, *words)["ranks"]
    (more,), (usual,) = (inspect(capsys, path, "--ep-size", 2, "--redundant-experts", n)["ranks"] for n in (3, 0))
    slot = len(model.moe_layers) * size.expert_bytes(model, "float32", has_native_weights("cpu"))
    assert (found["ep_size"], found["slots_per_layer"]) == (2, [10, 7])
    assert found["expert_bytes"] == more["expert_bytes"] == 10 * slot, "that of the largest rank"
    assert usual["all_ranks_bytes"] + 3 * slot == found["all_ranks_bytes"] == more["all_ranks_bytes"] - 3 * slot
    assert cli.main(["inspect", *map(str, words)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["2", "10,7"]


def test_what_is_printed(path, capsys):
    assert cli.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"model       {path} (glm4_moe, float32)"
    assert lines[2] == "layers      3, of which 2 have experts"
    size_mb = "0.03" if has_native_weights("cpu") else "0.01"  # native kernels hold 24 outputs in a panel of 64
    assert lines[3] == f"experts     12 per layer, 4 per token, 24 wide, 48 wide shared; {size_mb} MB each"
    assert "Memory with all ranks on this host; 0.23 GB are free:" in lines
    table = [line.split() for line in lines[lines.index("Memory with all ranks on this host; 0.23 GB are free:") + 2 :]]
    model = read_model_config(path)
    slots = [str(slots_per_rank(EngineConfig("m", ep_size=ranks), model, ranks)[0]) for ranks in (1, 2, 4, 8)]
    assert [(row[0], row[1], row[-1]) for row in table] == [
        ("1", slots[0], "yes"),
        ("2", slots[1], "no"),
        ("4", slots[2], "no"),
        ("8", slots[3], "no"),
    ]


def test_on_gpus_it_is_not_known(path, capsys):
    found = inspect(capsys, path, "--device", "cuda")
    assert found["available_bytes"] is None and {row["fits"] for row in found["ranks"]} == {None}
    assert cli.main(["inspect", str(path), "--device", "cuda"]) == 0
    assert "Whether ranks fit on GPUs is seen when they start." in capsys.readouterr().out


def test_no_more_ranks_than_experts_by_default(tmp_path, capsys):
    save(make_model("mixtral"), tmp_path)  # five experts
    assert [row["ep_size"] for row in inspect(capsys, tmp_path)["ranks"]] == [1, 2, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/no/such"], "model: '/no/such' is no directory"),
        ([], "model: missing"),
        (["{path}", "--ep-size", "13"], "ep_size: 13 is not allowed; it must be at most 12, the model's experts"),
        (["{path}", "--ep-size", "0"], "ep_size: 0 is not allowed"),
        (["{path}", "--redundant-experts", "-2"], "redundant_experts: -2 is not allowed"),
        (
            ["{path}", "--redundant-experts", "1,2", "--ep-size", "2,4"],
            "redundant_experts: (1, 2) is not allowed; it must be an integer of at least 0, or one per rank (4)",
        ),
        (
            ["{path}", "--redundant-experts", ",".join("1" * 13)],
            "ep_size: 13 is not allowed; it must be at most 12, the model's experts",
        ),
        (["{path}", "--batch-size", "x"], "batch_size: 'x' is not allowed"),
        (["{path}", "--max-model-len", "97"], "max_model_len: 97 is not allowed"),
        (
            ["{path}", "--kv-cache-memory-bytes", "9"],
            "kv_cache_memory_bytes: 9 bytes per rank do not hold a sequence of",
        ),
        (["{path}", "--port", "9"], "unrecognized arguments: --port"),
    ],
)
def test_bad_input_gets_one_line(path, words, message, capsys):
    assert cli.main(["inspect", *(word.format(path=path) for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"moe-runtime: error: {message}")
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_a_file_of_options(path, tmp_path, capsys):
    file = tmp_path / "inspect.yaml"
    file.write_text(f"model: {path}\nep_size: 2\nbatch_size: [4]\njson: true\n")
    assert cli.main(["inspect", "--config", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["ep_size"] for row in found["ranks"]] == [2] and [row["batch_size"] for row in found["decode"]] == [4]
