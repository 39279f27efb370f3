"""`moe-runtime quantize`: what it writes gives the tokens of weights that are quantised while they are loaded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized_runs import answers
from rank_pool import RankPool
from safetensors.torch import load_file
from tiny_models import make_model, save

from moe_runtime.cli.main import main
from moe_runtime.cli.quantize import _partial_folder
from moe_runtime.models.registry import read_model_config

# Groups must divide the inputs of all matrices.
CASES = [
    ("qwen3 bias, tied", {"moe_intermediate_size": 32}, "int8", "experts,attention,head", 16),
    ("qwen3 dense between", {"moe_intermediate_size": 32, "intermediate_size": 64}, "int4", "experts", 16),
    ("deepseek3", {"moe_intermediate_size": 32, "intermediate_size": 64}, "int4", "experts", 16),
    ("gpt-oss", {"hidden_size": 64, "intermediate_size": 96}, "mxfp4", "experts,head", 32),
    ("granite shared", {"intermediate_size": 64, "shared_intermediate_size": 32}, "fp8", "experts,attention,head", 16),
    ("mixtral", {"hidden_size": 64}, "int8", "attention", 32),
]


@pytest.mark.parametrize(("case", "sizes", "method", "parts", "group"), CASES)
def test_written_weights_are_those_quantised_on_load(
    rank_pool: Callable[[int], RankPool],
    tmp_path: Path,
    case: str,
    sizes: dict[str, int],
    method: str,
    parts: str,
    group: int,
) -> None:
    path, out = save(make_model(case, **sizes), tmp_path / "plain"), tmp_path / "new" / "quantised"
    assert main(["quantize", str(path), "-o", str(out), "--quantization", method, "--quantization-parts", parts]) == 0
    options = {"quantization": method, "quantization_parts": parts, "quantization_group_size": group}
    wanted = answers(rank_pool, path, dtype="float32", **options)
    assert answers(rank_pool, out, dtype="float32", is_quantized=True) == wanted
    formats = read_model_config(out).layers[-1].formats
    held = {"experts": formats.experts.output, "attention": formats.attention.output}
    assert [part for part, format in held.items() if format] == [part for part in parts.split(",") if part != "head"]
    names = set(load_file(next(out.glob("*.safetensors"))))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names and not list(out.parent.glob(".partial*"))


def test_what_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = save(make_model("qwen3", moe_intermediate_size=32), tmp_path / "plain"), tmp_path / "out"

    def refusal(model: Path, out: Path, *options: str) -> str:
        assert main(["quantize", str(model), "-o", str(out), *options]) == 2
        assert not list(tmp_path.glob(".partial*"))
        return capsys.readouterr().err

    int8 = ("--quantization", "int8")
    assert "quantization: missing; it must be one of ['int8'" in refusal(path, out)
    assert "it must be a folder that does not exist" in refusal(path, path, *int8)
    assert "output: '/proc/x' cannot be written (" in refusal(path, Path("/proc/x"), *int8)
    assert (
        "quantization_group_size: 32 is not allowed for this model; groups must divide the inputs of all matrices, "
        "which are [32, 48, 96]; it must be one of [16]"
    ) in refusal(path, out, *int8, "--quantization-group-size", "32")
    assert main(["quantize", str(path), "-o", str(out), *int8]) == 0
    capsys.readouterr()
    assert "the checkpoint is quantised already (int8 g16)" in refusal(
        out, tmp_path / "again", "--quantization", "int4"
    )
    odd = save(make_model("qwen3"), tmp_path / "odd")
    text = "quantization_group_size: 32 is not allowed for this model; groups must divide the inputs of all matrices, "
    assert text + "which are [24, 48, 96], and none of [32] does" in refusal(
        odd, tmp_path / "again", "--quantization", "mxfp4"
    )


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("qwen3", moe_intermediate_size=32)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.inf
    path, out = save(model, tmp_path / "plain"), tmp_path / "out"
    assert main(["quantize", str(path), "-o", str(out), "--quantization", "int8"]) == 2
    assert "model: tensor 'lm_head.weight' is damaged: it has weights that are NaN or" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def write_until_ended(out: Path) -> None:
    with _partial_folder(out) as partial:
        (partial / "file").touch()
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_leaves_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        write_until_ended(tmp_path / "out")
    assert end.value.code == 128 + signal.SIGTERM and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before
