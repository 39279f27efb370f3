"""The Triton kernels compile for every supported generation of chip, without a GPU, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from moe_runtime.kernels import triton as triton_kernels

SHARED_KB = {"sm_80": 163, "sm_90": 227, "sm_100": 227}
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}
# First word of a form -> the kernel that it is a form of.
KERNELS = {
    name: name
    for name in (
        "combine",
        "count",
        "decode_attention",
        "dense_gemm",
        "grouped_gemm",
        "merge_chunks",
        "place",
        "prefill_attention",
        "scale_rows",
        "silu_mul",
        "store_kv",
        "store_quantized",
        "tile_map",
        "topk_gate",
    )
} | {"add_rms_norm": "rms_norm", "rotary_store_kv": "rotary"}


def check_kernels(**extra_env):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | extra_env
    script = ROOT / "scripts" / "check_kernels.py"
    return subprocess.run(
        [sys.executable, script, "--one-tile", "--json"], env=env, cwd=ROOT / "scripts", capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def reports():
    child = check_kernels()
    assert child.returncode == 0, child.stdout + child.stderr
    return json.loads(child.stdout)


def test_every_kernel_is_compiled_for_every_chip(reports):
    kernels = {(report["form"].split()[0], report["chip"]) for report in reports}
    assert kernels == {(name, chip) for name in KERNELS for chip in SHARED_KB}
    sources = Path(triton_kernels.__file__).parent.glob("*.py")
    entries = {name for file in sources for name in re.findall(r"^def (\w+)_kernel\(", file.read_text(), re.MULTILINE)}
    assert entries == {KERNELS[name] for name in KERNELS}, "a kernel is not checked"


@pytest.mark.parametrize("chip", SHARED_KB)
def test_fits_the_chip(reports, chip):
    for report in (report for report in reports if report["chip"] == chip):
        assert report["problems"] == []
        assert 0 < report["num_registers"] <= 255, report
        assert report["num_spill_bytes"] == 0, report
        assert report["num_shared_bytes"] <= SHARED_KB[chip] * 1024, report


@pytest.mark.parametrize("chip", SHARED_KB)
def test_multiplies_on_the_tensor_cores_of_its_generation(reports, chip):
    names = ("grouped_gemm", "dense_gemm", "prefill_attention")
    forms = [r for r in reports if r["chip"] == chip and r["form"].startswith(names)]
    assert {r["tensor_core"] for r in forms if "MLA" not in r["form"]} == {TENSOR_CORE[chip]}
    # A tile of latent attention has 32 rows, which are too few for the newer instructions.
    assert {r["tensor_core"] for r in forms if "MLA" in r["form"]} == {"mma.sync"}


def test_quantised_weights_are_among_them(reports):
    names = [report["form"] for report in reports]
    assert all(any(f" {weights} " in name for name in names) for weights in ("fp8", "nvfp4", "int4 zeros"))


def test_refuses_to_run_in_the_interpreter():
    child = check_kernels(TRITON_INTERPRET="1")
    assert child.returncode == 2 and "exclude each other" in child.stderr, child.stderr
