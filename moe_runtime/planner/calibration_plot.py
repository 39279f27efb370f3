"""The picture of a calibration: loss over the mean number of experts, for adaptive policies and fixed k."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

STYLE = {
    ("top_k", "global"): ("fixed k", "#222222", "o-"),
    ("top_p", "global"): ("top_p", "#3b528b", "s--"),
    ("threshold", "global"): ("threshold", "#21918c", "^--"),
    ("threshold", "per layer"): ("threshold per layer", "#e07b39", "v--"),
}
SIZE, DPI = (9.0, 3.9), 150


def draw(title: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG with two panels from the rows of a calibration: divergence from the full model, and perplexity."""
    rows = [row for row in rows if row["text"] == "all"]
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, (name, label) in zip(
        figure.subplots(1, 2), (("kl", "KL to the full model, nats"), ("perplexity", "perplexity")), strict=True
    ):
        for (kind, scope), (shown, colour, line) in STYLE.items():
            points = sorted((row["mean_k"], row[name]) for row in rows if (row["kind"], row["scope"]) == (kind, scope))
            if points:
                axes.plot(*zip(*points, strict=True), line, color=colour, label=shown, markersize=5, linewidth=1.4)
        full = next(row for row in rows if row["kind"] == "full")
        axes.plot(full["mean_k"], full[name], "*", color="#c0392b", markersize=10, label="full model")
        axes.set_xlabel("mean experts per token, measured", fontsize=9)
        axes.set_title(label, fontsize=9)
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
