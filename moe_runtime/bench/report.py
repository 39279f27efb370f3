"""Computes figures from records, for a table and a JSON file. Names are those of `vllm bench serve`."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.bench.options import BenchOptions
from moe_runtime.bench.runs import Record, Run
from moe_runtime.bench.workload import rate_name
from moe_runtime.types.version import __version__

FORMAT = "moe_runtime.bench"
FORMAT_VERSION = 1
PERCENTILES = (50, 90, 99)
LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}


@dataclass(frozen=True)
class Report:
    """The results of a measurement.

    Attributes:
        options: the options of the measurement.
        health: what the engine or server reports of itself.
        runs: one per request rate.
    """

    options: BenchOptions
    health: dict[str, Any]
    runs: Sequence[Run]

    @property
    def num_failed(self) -> int:
        return sum(record.error is not None for run in self.runs for record in run.records)

    @property
    def title(self) -> str:
        """One line: model, ranks, lengths."""
        health, options = self.health, self.options
        ranks = "1 rank" if health["ep_size"] == 1 else f"{health['ep_size']} ranks"
        limit = "" if options.max_concurrency is None else f", at most {options.max_concurrency} at once"
        return (
            f"{Path(str(health['model'])).name}, {health['dtype']}, {ranks} on {health['device']}: "
            f"{options.num_prompts} requests of {options.input_len} tokens, {options.output_len} generated{limit}"
        )

    def table(self) -> str:
        """The figures, with a column per request rate; failures are listed below."""
        results = [summarize(run) for run in self.runs]
        rows = [["request rate (req/s)", *(rate_name(run.request_rate) for run in self.runs)]]
        for name, key, form in (
            ("completed", "completed", "d"),
            ("failed", "failed", "d"),
            ("duration (s)", "duration", ".2f"),
            ("request throughput (req/s)", "request_throughput", ".2f"),
            ("output throughput (tok/s)", "output_throughput", ".1f"),
            ("total throughput (tok/s)", "total_token_throughput", ".1f"),
        ):
            rows.append([name, *(_number(result[key], form) for result in results)])
        for latency, name in LATENCIES.items():
            rows.append([f"{name}, {latency.upper()} (ms)", *[""] * len(results)])
            for statistic in ("mean", *(f"p{percentile}" for percentile in PERCENTILES)):
                key = f"{statistic}_{latency}_ms"
                rows.append([f"  {statistic}", *(_number(result[key], ".2f") for result in results)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.title, ""]
        for first, *others in rows:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        for run, result in zip(self.runs, results, strict=True):
            for message, count in result["errors"].items():
                lines.append(f"failed at rate {rate_name(run.request_rate)}: {count} x {message}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values; an infinite rate is "inf"."""
        options = asdict(self.options)
        options["request_rate"] = [_json_rate(rate) for rate in self.options.request_rate]
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "options": options,
            "machine": None if self.options.url else describe_machine(),
            "engine": self.health,
            "results": [summarize(run) | {"requests": _requests(run.records)} for run in self.runs],
        }


def summarize(run: Run) -> dict[str, Any]:
    """Figures of one rate. Latencies and throughputs are those of completed requests."""
    done = [record for record in run.records if record.error is None]
    num_input, num_output = sum(r.input_len for r in done), sum(r.num_tokens for r in done)
    values = {
        "ttft": [r.ttft for r in done],
        "tpot": [r.tpot for r in done if r.tpot is not None],
        "itl": [gap for r in done for gap in r.itls],
        "e2el": [r.e2el for r in done],
    }
    result: dict[str, Any] = {
        "request_rate": _json_rate(run.request_rate),
        "completed": len(done),
        "failed": len(run.records) - len(done),
        "duration": run.duration,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / run.duration,
        "output_throughput": num_output / run.duration,
        "total_token_throughput": (num_input + num_output) / run.duration,
    }
    for name in LATENCIES:
        milliseconds = 1000 * np.array(values[name])
        some = len(milliseconds) > 0
        result[f"mean_{name}_ms"] = float(milliseconds.mean()) if some else None
        for percentile in PERCENTILES:
            result[f"p{percentile}_{name}_ms"] = float(np.percentile(milliseconds, percentile)) if some else None
    result["errors"] = dict(Counter(record.error for record in run.records if record.error is not None))
    return result


def describe_machine() -> dict[str, Any]:
    """The host of the front: processor, cores that it may use, memory."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    return {
        "processor": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def _requests(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            "input_len": record.input_len,
            "output_len": record.output_len,
            "start": record.start,
            "ttft": record.ttft if record.times else None,
            "e2el": record.e2el if record.error is None else None,
            "num_tokens": record.num_tokens,
            "error": record.error,
        }
        for record in records
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _json_rate(rate: float) -> float | str:
    return rate if np.isfinite(rate) else "inf"
