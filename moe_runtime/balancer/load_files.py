"""An expert load as JSON, as NPZ, and as the interactive HTML page.

Shape suffixes: L MoE layers, E logical experts, W ranks, S slots per rank.
"""

from __future__ import annotations

import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.balancer.expert_counts import FORMAT, FORMAT_VERSION, PHASES, ExpertCounts
from moe_runtime.balancer.placement import Placement
from moe_runtime.system.files import field, require_format
from moe_runtime.system.npz import read_npz

HTML_DATA_MARK = "__EXPERT_LOAD_JSON__"


def to_json(load: ExpertCounts) -> bytes:
    return (json.dumps(load.to_dict()) + "\n").encode()


def to_html(load: ExpertCounts) -> bytes:
    """The page `heatmap.html` with the load's JSON inside; it needs no other file and sends no requests."""
    page = resources.files("moe_runtime.balancer").joinpath("heatmap.html").read_text(encoding="utf-8")
    before, after = page.split(HTML_DATA_MARK)
    # json.dumps leaves only ASCII; without < and > nothing in it can end the script element
    data = json.dumps(load.to_dict()).replace("<", "\\u003c").replace(">", "\\u003e")
    return (before + data + after).encode()


def to_npz(load: ExpertCounts) -> bytes:
    """Arrays `prefill`, `decode` [L, E], `layer_ids` [L], `slots` [L, W, S] if placed, and `metadata` (JSON text)."""
    arrays: dict[str, Any] = {**load.tokens, "layer_ids": np.asarray(load.layer_ids, np.int64)}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": load.model,
        "top_k": load.top_k,
        "num_experts": load.num_experts,
    }
    if load.placement is not None:
        arrays["slots"] = load.placement.slots
        metadata["placement_version"] = load.placement.version
    file = io.BytesIO()
    np.savez_compressed(file, **arrays, metadata=np.array(json.dumps(metadata)))
    return file.getvalue()


def from_npz(path: Path) -> dict[str, Any]:
    """The arguments of the `ExpertLoad` in the file; ValueError if the file is no expert load or is damaged."""
    arrays, metadata = read_npz(path, ("layer_ids", *PHASES))
    metadata = require_format(metadata, FORMAT, FORMAT_VERSION)
    tokens = {phase: arrays[phase] for phase in PHASES}
    layer_ids = tuple(arrays["layer_ids"].ravel().tolist())
    placement = None
    if "slots" in arrays:
        version = field(metadata, "placement_version", int)
        placement = Placement(arrays["slots"], field(metadata, "num_experts", int), layer_ids, version)
    return {
        "tokens": tokens,
        "layer_ids": layer_ids,
        "placement": placement,
        "model": field(metadata, "model", str),
        "top_k": field(metadata, "top_k", int, optional=True),
    }
