"""How many tokens each expert got: the counts with their files and pictures.

Shape suffixes: L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.expert_counts import FORMAT, FORMAT_VERSION, ExpertCounts
from moe_runtime.balancer.load_csv import from_csv, to_csv
from moe_runtime.balancer.load_files import from_npz, to_html, to_json, to_npz
from moe_runtime.balancer.placement import Placement
from moe_runtime.system.files import field, parse_json, read_text, require_format

PICTURES = ("png", "svg")
ENCODERS = {"html": to_html, "csv": to_csv, "json": to_json, "npz": to_npz}
DECODERS = {"npz": from_npz, "csv": from_csv}
SAVED = (*PICTURES, *ENCODERS)
SUFFIXES = tuple(f".{name}" for name in SAVED)
LOADED = ("json", *DECODERS)


class ExpertLoad(ExpertCounts):
    """Token rows per MoE layer and logical expert, counted separately for prefill and decode.

    A token that uses k experts counts once for each of them, so a layer's counts add up to k times its tokens.
    In all methods `phase` is "prefill", "decode", or None for their sum. The arrays are read-only.

    Attributes:
        tokens: "prefill" and "decode" -> int64 [L, E].
        layer_ids: the layers' indices in the model, ascending.
        placement: where the experts were while tokens were counted; None: each expert counts as a rank of its own.
        model: name shown in pictures and files.
        top_k: experts per token of the model, if known.

    Raises:
        ValueError: shapes that do not match, negative counts, or another phase.
    """

    @classmethod
    def from_dict(cls, data: object) -> ExpertLoad:
        """The load that `to_dict` described; fields computed from the counts are ignored.

        Raises:
            ValueError: another format, or a missing or wrong field.
        """
        data = require_format(data, FORMAT, FORMAT_VERSION)
        phases = field(data, "phases", Mapping)
        placement = field(data, "placement", Mapping, optional=True)
        return cls(
            tokens={phase: _as_array(phase, counts) for phase, counts in phases.items()},
            layer_ids=tuple(field(data, "layer_ids", list)),
            placement=None if placement is None else Placement.from_dict(placement),
            model=field(data, "model", str),
            top_k=field(data, "top_k", int, optional=True),
        )

    def render(self, format: str) -> bytes:
        """The contents of a file of this load: "png", "svg", "html", "csv", "json" or "npz".

        Raises:
            ValueError: another format.
        """
        if format not in SAVED:
            raise ValueError(f"format: {format!r} is not allowed; it must be one of {', '.join(SAVED)}")
        if format in PICTURES:
            from moe_runtime.balancer import heatmap  # imports matplotlib, which only pictures need

            return heatmap.draw(self, format)
        return ENCODERS[format](self)

    def save(self, path: str | Path) -> None:
        """Write the load in the format of the suffix: .png, .svg, .html, .csv, .json or .npz.

        Raises:
            ValueError: another suffix.
        """
        Path(path).write_bytes(self.render(_format_of(path, SAVED)))

    @classmethod
    def load(cls, path: str | Path) -> ExpertLoad:
        """Read what `save` wrote as .json, .npz or .csv; the result equals what was saved.

        Raises:
            ValueError: another suffix, or a file that is no load or is damaged; the message names file and fault.
            OSError: it cannot be read.
        """
        format = _format_of(path, LOADED)
        try:
            if format == "json":
                return cls.from_dict(parse_json(read_text(Path(path))))
            return cls(**DECODERS[format](Path(path)))
        except ValueError as error:
            raise ValueError(f"{path}: not an expert load file: {error}") from error


def _as_array(phase: str, counts: object) -> npt.NDArray[Any]:
    try:
        return np.asarray(counts)
    except ValueError as error:
        raise ValueError(f"{phase}: rows of different lengths are not allowed; it must be [layers, experts]") from error


def _format_of(path: str | Path, allowed: tuple[str, ...]) -> str:
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in allowed:
        raise ValueError(f"{path}: suffix {suffix!r} is not allowed; it must be one of {', '.join(allowed)}")
    return suffix
