"""`moe-runtime quantize`: what it writes gives the tokens of weights that are quantised while they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from quantized_runs import answers
from rank_pool import RankPool
from safetensors.torch import load_file
from tiny_models import make_model, save

from moe_runtime.cli.main import main
from moe_runtime.models.registry import read_model_config

CASES = [
    ("qwen3 bias, tied", "int8", "experts,attention,head"),
    ("qwen3 dense between", "int4", "experts"),
    ("deepseek3", "int4", "experts,attention"),
    ("gpt-oss", "mxfp4", "experts,head"),
    ("granite shared", "fp8", "experts,attention,head"),
    ("mixtral", "int8", "attention"),
]


@pytest.mark.parametrize(("case", "method", "parts"), CASES)
def test_written_weights_are_those_quantised_on_load(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, case: str, method: str, parts: str
) -> None:
    path, out = save(make_model(case), tmp_path / "plain"), tmp_path / "new" / "quantised"
    assert main(["quantize", str(path), "-o", str(out), "--quantization", method, "--quantization-parts", parts]) == 0
    wanted = answers(rank_pool, path, dtype="float32", quantization=method, quantization_parts=parts)
    assert answers(rank_pool, out, dtype="float32", is_quantized=True) == wanted
    formats = read_model_config(out).layers[-1].formats
    held = {"experts": formats.experts.output, "attention": formats.attention.output}
    assert [part for part, format in held.items() if format] == [part for part in parts.split(",") if part != "head"]
    names = set(load_file(next(out.glob("*.safetensors"))))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names and not list(out.parent.glob(".partial*"))


def test_what_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = save(make_model("qwen3"), tmp_path / "plain"), tmp_path / "out"
    assert main(["quantize", str(path), "-o", str(out)]) == 2
    assert "quantization: missing; it must be one of ['int8'" in capsys.readouterr().err
    assert main(["quantize", str(path), "-o", str(path), "--quantization", "int8"]) == 2
    assert "it must be a folder that does not exist" in capsys.readouterr().err
    assert main(["quantize", str(path), "-o", str(out), "--quantization", "int8"]) == 0
    again = tmp_path / "again"
    assert main(["quantize", str(out), "-o", str(again), "--quantization", "int4"]) == 2
    assert "the checkpoint is quantised already (int8 g128)" in capsys.readouterr().err
    assert not again.exists()
