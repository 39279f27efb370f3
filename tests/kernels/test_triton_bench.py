"""The GPU benchmark checks itself without a GPU, and its checks find errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from places import SCRIPTS

from moe_runtime.kernels import ops


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from gpu_bench import checks, shapes

    return lambda: checks.check_all(shapes.SMALL_SHAPES[1:], torch.device("cpu"), torch.float32)


def test_runs_without_a_gpu(tmp_path):
    command = [sys.executable, SCRIPTS / "bench_gpu.py", "--cpu", "--no-models", "--out", tmp_path]
    child = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert child.returncode == 0, child.stderr
    result = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert {row["what"] for row in result["rows"]} >= {"experts", "decode attention", "prefill attention"}
    assert all(row["ours_us"] > 0 for row in result["rows"]) and result["left_out"] == []
    assert (tmp_path / "bench_gpu.png").stat().st_size > 0
    assert child.stdout.endswith((tmp_path / "bench_gpu.md").read_text())


def test_without_a_gpu_it_must_be_told(tmp_path):
    child = subprocess.run(
        [sys.executable, SCRIPTS / "bench_gpu.py", "--out", tmp_path],
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 2 and "no GPU is here" in child.stderr


def test_every_op_is_checked(checks):
    found = checks()
    assert all(check.passed for check in found), found
    names = " ".join(check.op for check in found)
    assert all(name in names for name in ops.describe(torch.device("cpu")) if name not in UNCHECKED)


# Those that have the same kernel as one that is checked.
UNCHECKED = {"apply_rotary", "store_kv", "group_by_slot", "combine_topk", "decode_attention"}


@pytest.mark.parametrize(
    "wrong", [lambda out: out * 1.001, lambda out: torch.empty_like(out), lambda out: out.roll(1, 0)]
)
def test_a_wrong_result_and_memory_never_written_are_found(checks, monkeypatch, wrong):
    right = ops.silu_mul
    monkeypatch.setattr(ops, "silu_mul", lambda x: wrong(right(x)))
    assert [check.op for check in checks() if not check.passed] == ["silu_mul"]
