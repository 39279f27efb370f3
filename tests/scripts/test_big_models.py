"""The benchmark of big models, with tiny files and without llama.cpp."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
from types import ModuleType

import gguf
import numpy as np
import pytest
from places import SCRIPTS

from moe_runtime.memory.model_size import count_parameters
from moe_runtime.models.registry import family_module

MODULES = ("bench_big_models", "big_models", "bench_model", "make_bench_model", "check_memory", "peers", "served")
NAMES = ("gpt-oss-20b", "qwen3-30b-a3b")


@pytest.fixture
def big(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of `scripts`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]


@pytest.fixture
def written(big, tmp_path):
    """A tiny model and its file."""

    def write(name: str):
        model = big("big_models.models").big_models(tiny=True)[name]
        file = tmp_path / "files" / f"{name}.gguf"
        big("big_models.file").write_model(model, file)
        return model, file

    return write


@pytest.mark.parametrize(("name", "gigabytes"), [("gpt-oss-20b", 13.8), ("qwen3-30b-a3b", 17.7)])
def test_shapes_are_the_published_ones(big, name, gigabytes):
    model = big("big_models.models").big_models()[name]
    parsed = family_module(model.config["model_type"]).parse(dict(model.config))
    assert sum(math.prod(tensor.size) for tensor in model.tensors) == count_parameters(parsed).total
    assert model.nbytes / 1e9 == pytest.approx(gigabytes, abs=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_what_the_model_says(written, name):
    model, file = written(name)
    found = gguf.GGUFReader(file).tensors
    sizes = [tuple(reversed(tensor.shape.tolist())) for tensor in found]
    assert [(tensor.name, tensor.tensor_type) for tensor in found] == [(t.name, t.kind) for t in model.tensors]
    assert sizes == [tensor.size for tensor in model.tensors]
    spreads = {tensor.name: tensor.spread for tensor in model.tensors}
    assert spreads["output.weight"] != spreads["blk.0.attn_output.weight"] != spreads["blk.0.attn_q.weight"]
    for tensor, meant in zip(found, model.tensors, strict=True):
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.size > 1000:
            mean, deviation = meant.spread
            assert values.mean() == pytest.approx(mean, abs=0.2 * deviation), tensor.name
            assert values.std() == pytest.approx(deviation, rel=0.5), tensor.name
    before = file.read_bytes()
    written(name)
    assert file.read_bytes() == before


def test_pieces_of_a_tensor_are_whole_rows(big, monkeypatch):
    file, models = big("big_models.file"), big("big_models.models")
    tensor = models.StoredTensor("x", models.Kind.Q4_0, (3, 5, 64), (0.0, 0.02))
    monkeypatch.setattr(file, "PIECE_WEIGHTS", 4 * 64)
    pieces = list(file.random_pieces(tensor, np.random.default_rng()))
    assert [piece.nbytes for piece in pieces] == [4 * 36] * 3 + [3 * 36]
    assert sum(piece.nbytes for piece in pieces) == tensor.nbytes


def test_a_file_that_does_not_fit_is_not_begun(big, written, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"^folder: .* has 0\.0 GB free; gpt-oss-20b-tiny needs 1\.1 GB$"):
        written("gpt-oss-20b")
    assert not list((tmp_path / "files").iterdir())


def test_an_interrupted_run_leaves_no_file(big, written, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(big("big_models.file"), "random_pieces", interrupt)
    with pytest.raises(KeyboardInterrupt):
        written("gpt-oss-20b")
    assert not list((tmp_path / "files").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_the_runtime_runs_it(big, written, name):
    model, file = written(name)
    ours, memory = big("peers.ours_engine"), big("big_models.memory")
    config = ours.config_of([str(file), "1", "auto", "2", "80"])
    (planned,) = memory.planned(config).ranks
    engine = ours.OursEngine(config)
    try:
        assert engine.info()["pids"] == [os.getpid()]
        prompts = np.random.default_rng().integers(0, 512, (2, 64)).tolist()
        assert engine.generate(prompts, 3)["decode_tokens"] == 4
        values = [logprobs for prompt in engine.logprobs(prompts, 5) for _, logprobs in prompt]
        assert np.isfinite(np.concatenate(values)).all() and np.concatenate(values).std() > 0.1
        used = engine.routing(prompts, 1)["1"]["prefill"]["total"] / model.config["num_hidden_layers"]
        assert used > 4  # of 8
        rank = engine.engine.executor.ranks[0]
        assert rank.weight_bytes == pytest.approx(planned.weights, rel=0.01)
        assert set(engine.engine.health()["quantization"].values()) & {"fp4 g32", "int4 g32"}
    finally:
        engine.engine.close()


def test_memory_of_a_process(big):
    memory = big("big_models.memory").RankMemory(os.getpid(), planned=1000)
    held = np.ones(1 << 23)  # 64 MiB
    memory.finish()
    assert memory.after >= memory.loaded + held.nbytes // 2
    assert memory.peak >= held.nbytes and memory.ratio == max(memory.after, memory.peak) / 1000


def test_a_whole_run(big, tmp_path, capsys):
    bench = big("bench_big_models")
    folders = ["--folder", str(tmp_path / "files"), "--out", str(tmp_path / "out")]
    arguments = ["--tiny", "--models", "qwen3-30b-a3b", "--engines", "ours", "--repetitions", "1", *folders]
    assert bench.main(arguments) == 0
    assert not list((tmp_path / "files").iterdir())
    results = json.loads((tmp_path / "out" / "qwen3-30b-a3b-tiny.json").read_text())
    assert [(s["phase"], s["case"]) for s in results["samples"]] == [
        *(("decode", f"{batch} x 64") for batch in (1, 4, 16)),
        ("prefill", "1 x 512"),
    ]
    (memory,) = results["memory"]
    assert memory["loaded"] > 50e6 and memory["peak"] >= memory["loaded"] > 0
    assert (tmp_path / "out" / "qwen3-30b-a3b-tiny.png").stat().st_size > 1000
    assert "| decode | 16 x 64 | ours |" in capsys.readouterr().out


def test_too_much_memory_and_other_weights_are_problems(big):
    bench = big("bench_big_models")
    memory = [{"engine": "ours", "rank": rank, "ratio": ratio} for rank, ratio in enumerate((1.09, 1.11))]
    results = {"model": "m", "memory": memory, "differences": {"llama.cpp": 0.9, "ours-ep2": 1.1}}
    assert bench.find_problems(results, tiny=False) == [
        "m: ours, rank 1 took 1.110 times what was planned",
        "m: log-probabilities in ours-ep2 differ by 1.100",
    ]
    assert len(bench.find_problems(results, tiny=True)) == 1


def test_ranks_that_do_not_fit_are_left_out_by_name(big, written, tmp_path, monkeypatch):
    model, file = written("gpt-oss-20b")
    runs, memory = big("big_models.runs"), big("big_models.memory")
    monkeypatch.setattr(memory, "available_host_memory", lambda: 10**8)
    results = runs.Runs(model, file, ["ours-ep2"], 1, tmp_path / "logs").run()
    assert results["samples"] == []
    assert "2 ranks" in results["absent"]["ours-ep2"] and "only 0.10 GB are free" in results["absent"]["ours-ep2"]
