"""The measurement of the prefix cache runs, with a small model and few tokens."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from places import SCRIPTS
from tiny_models import make_model, save

SIZES = {"PREFIX_TOKENS": 48, "OWN_TOKENS": 8, "BATCH": 2, "PROMPT_TOKENS": 16, "OUTPUT_TOKENS": 4}


def test_it_writes_table_samples_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("bench_prefix_cache")
    for name in ("bench_prefix_cache", "make_bench_model", "bench_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    model = save(make_model("qwen3"), tmp_path / "model")
    monkeypatch.setattr(script, "ensure_bench_model", lambda shape: model)
    for name, value in SIZES.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(sys, "argv", ["bench_prefix_cache.py", "--rounds", "3", "--out", str(tmp_path / "out")])
    script.main()
    found = json.loads((tmp_path / "out" / "prefix.json").read_text())
    for samples in (found["seconds_to_first_token"], found["tokens_per_second"]):
        assert {way: len(values) for way, values in samples.items()} == {"on": 3, "off": 3}
        assert min(map(min, samples.values())) > 0
    assert found["evictions"] > 0
    assert len((tmp_path / "out" / "prefix.md").read_text().splitlines()) == 4
    assert (tmp_path / "out" / "prefix.png").stat().st_size > 1000
