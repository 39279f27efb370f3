"""Routing traces: refused values, counts, and files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_runtime.balancer.trace import UNUSED, RoutingTrace


def make_trace(num_tokens: int = 50, num_layers: int = 3, num_experts: int = 300, top_k: int = 4) -> RoutingTrace:
    """Random routing, in which a fifth of the places are unused."""
    random = np.random.default_rng()
    experts = random.random((num_tokens, num_layers, num_experts)).argsort(-1)[..., :top_k].astype(np.uint16)
    experts[random.random(experts.shape) < 0.2] = UNUSED
    return RoutingTrace(
        experts,
        np.sort(random.integers(0, 9, num_tokens)).astype(np.int32),
        random.integers(0, 3, num_tokens).astype(np.uint16),
        random.random(num_tokens) < 0.5,
        num_experts,
        (1, 2, 5)[:num_layers],
        "tiny",
        top_k,
    )


def test_counts_leave_out_what_was_not_used() -> None:
    trace = make_trace()
    expected = np.zeros((2, 3, 300), np.int64)
    for token in range(trace.num_tokens):
        for layer in range(3):
            for expert in trace.experts[token, layer]:
                if expert != UNUSED:
                    expected[int(trace.is_decode[token]), layer, expert] += 1
    assert np.array_equal(trace.counts(), expected)


def test_a_file_gives_the_same_trace(tmp_path: Path) -> None:
    trace = make_trace()
    trace.save(tmp_path / "routing.npz")
    found = RoutingTrace.load(tmp_path / "routing.npz")
    for name in ("experts", "step", "rank", "is_decode"):
        array = getattr(found, name)
        assert array.dtype == getattr(trace, name).dtype
        assert np.array_equal(array, getattr(trace, name))
        assert not array.flags.writeable
    for name in ("num_experts", "layer_ids", "model", "top_k"):
        assert getattr(found, name) == getattr(trace, name)


def test_an_empty_trace_is_one(tmp_path: Path) -> None:
    make_trace(num_tokens=0).save(tmp_path / "routing.npz")
    found = RoutingTrace.load(tmp_path / "routing.npz")
    assert (found.num_tokens, found.num_steps, found.num_ranks) == (0, 0, 0)
    assert not found.counts().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts: 0 is not allowed"),
        ({"num_experts": 70000}, "num_experts: 70000 is not allowed"),
        ({"num_experts": 2}, "top_k: 4 is not allowed"),
        ({"top_k": 3}, "must be top_k, 3"),
        ({"experts": np.full((50, 3, 4), 300)}, "must be below 300"),
        ({"experts": np.full((50, 3, 4), -1)}, "experts: int64 is not allowed"),
        ({"experts": np.zeros((50, 3))}, "must have 3 dimensions"),
        ({"experts": np.zeros((50, 3, 4))}, "experts: float64 is not allowed"),
        ({"layer_ids": (1, 2)}, "layer_ids"),
        ({"step": np.arange(50, 0, -1)}, "step: the numbers are not allowed"),
        ({"step": np.arange(-1, 49)}, "step: the numbers are not allowed"),
        ({"rank": np.zeros(49, np.uint16)}, "rank: 49 entries"),
        ({"is_decode": np.zeros(50, np.uint16)}, "is_decode: uint16 is not allowed"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_trace(), **change)


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "routing.npz"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        RoutingTrace.load(path)
    path.write_text("not an archive")
    with pytest.raises(ValueError, match="not a readable NPZ archive"):
        RoutingTrace.load(path)
    np.savez(path, experts=np.zeros(3))
    with pytest.raises(ValueError, match="lacks metadata, step, rank"):
        RoutingTrace.load(path)
    make_trace().save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable NPZ archive"):
        RoutingTrace.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something.else"}, "format: 'something.else' is not allowed"),
        ({"format_version": 2}, "format_version: 2 is not allowed"),
        ({"top_k": "4"}, "top_k: must be of type int"),
    ],
)
def test_other_formats_and_versions_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "routing.npz"
    make_trace().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    metadata = json.loads(str(arrays.pop("metadata"))) | change
    np.savez(path, **arrays, metadata=np.array(json.dumps(metadata)))
    with pytest.raises(ValueError, match=message):
        RoutingTrace.load(path)
