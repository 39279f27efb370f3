"""A whole decode step as on a GPU, interpreted on the CPU with the Triton forms: nothing waits for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import SUPPORT

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("qwen3 window", "usual"),
        ("glm4 groups", "invariant"),
        ("qwen3", "int4"),
        pytest.param("mixtral dynamic", "usual", marks=pytest.mark.slow),
        pytest.param("glm4 groups", "usual", marks=pytest.mark.slow),
    ],
)
def test_a_captured_step_waits_for_nothing(tmp_path: Path, case: str, kind: str) -> None:
    from tiny_models import make_model, save

    save(make_model(case, num_hidden_layers=2), tmp_path)
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}
    child = subprocess.run(
        [sys.executable, "-W", "error", str(SUPPORT / "decode_step.py"), str(tmp_path), kind],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["tokens"] == found["ordinary tokens"]
    assert found["largest difference"] <= (0.0 if kind == "invariant" else 1e-5)
    assert found["captured steps"] == 3 and "rotary_kernel" in found["kernels"] and "combine_kernel" in found["kernels"]
    assert {"decode_attention_kernel", "grouped_gemm_kernel", "topk_gate_kernel", "place_kernel"} <= set(
        found["kernels"]
    )
    assert ("dense_gemm_kernel" in found["kernels"]) == (kind != "usual")
