"""`moe-runtime bench`: measure a model here, or a running server."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.options import BenchOptions
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.options import given_values, only_fields, options_of, require_model, user_mistakes

if TYPE_CHECKING:
    from moe_runtime.bench.report import Report

SAID_WITH_URL = ("model", "tokenizer", "seed")


def bench(namespace: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 if a request failed.

    Raises:
        UserMistake: an option, the model or the server cannot be used.
        RankError: a rank failed to start.
        RequestError: a warm-up request failed.
    """
    with user_mistakes():
        values = given_values(namespace, [*options_of(BenchOptions), *options_of(EngineConfig)])
        options = BenchOptions(**only_fields(BenchOptions, values))
        engine = only_fields(EngineConfig, values)
        _check_engine(options, engine)
    from moe_runtime.bench.driver import measure

    report = asyncio.run(measure(options, engine))
    print(report.table())
    with user_mistakes():
        for path in options.output:
            save_report(report, Path(path))
    return 1 if report.num_failed else 0


def save_report(report: Report, path: Path) -> None:
    """Write a .json or .png file, by the suffix of `path`. Raises OSError if it cannot be written."""
    if path.suffix == ".json":
        path.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        return
    from moe_runtime.bench.plot import draw  # imports matplotlib, which only a plot needs

    path.write_bytes(draw(report))


def _check_engine(options: BenchOptions, engine: Mapping[str, Any]) -> None:
    """Check the engine's options as far as possible before it is loaded. A server has its own options."""
    if options.url is None:
        require_model(engine)
        EngineConfig(**engine)
        return
    for name in engine:
        if name not in SAID_WITH_URL:
            raise ValueError(f"{name}: is not allowed with url; the server has its own engine options")
