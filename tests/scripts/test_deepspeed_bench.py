"""The benchmark of one layer against DeepSpeed's: it compares the outputs, and its files contain every point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import SCRIPTS


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, "--shapes", "tiny", *map(str, arguments)],
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_point_is_measured_and_written(tmp_path: Path) -> None:
    quick = ("--tokens", 3, "--repetitions", 1, "--budget", 0.001)
    done = run(SCRIPTS / "bench_ep_layer.py", "--ranks", 1, 2, *quick, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    for ranks in (1, 2):
        assert f"{ranks} rank(s): the same outputs in float32" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    found = [(r["ranks"], r["routing"], r["tokens_per_rank"], set(r["ours_us"])) for r in results]
    several = {"all_gather", "all_to_all", "symmetric"}
    assert found == [
        (ranks, routing, 3, ways)
        for ranks, ways in ((1, {"local"}), (2, several))
        for routing in ("balanced", "skewed")
    ]
    for result in results:
        times = [result["floor_us"], result["deepspeed_us"], *result["ours_us"].values()]
        assert min(times) > 0
        for way, us in result["ours_us"].items():  # of one repetition, the median of ratios is the ratio
            assert result["faster"][way] == pytest.approx(result["deepspeed_us"] / us)
            assert result["of_floor"][way] == pytest.approx(result["floor_us"] / us)
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(results)
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")


def test_other_outputs_than_deepspeeds_end_the_run(tmp_path: Path) -> None:
    """With a tolerance of nothing, rounding alone is a difference."""
    script = (SCRIPTS / "bench_ep_layer.py").read_text().replace("torch.float32: 1e-5", "torch.float32: 0.0")
    strict = tmp_path / "strict.py"
    strict.write_text(script)
    done = run(strict, "--ranks", 2, "--check-only")
    assert done.returncode != 0 and "rows are not DeepSpeed's" in done.stderr
