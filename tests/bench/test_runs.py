"""Times and failures of requests, on a target whose timing is known."""

from __future__ import annotations

import asyncio
import json
import math

import numpy as np
import pytest

from moe_runtime.bench.options import BenchOptions
from moe_runtime.bench.report import Report, summarize
from moe_runtime.bench.runs import Record, Run, run_jobs
from moe_runtime.bench.targets import RequestError
from moe_runtime.bench.workload import Job
from moe_runtime.cli.bench import save_report

HEALTH = {"model": "/models/some-moe", "dtype": "float32", "ep_size": 2, "device": "cpu", "max_model_len": 99}


class TimedTarget:
    """First token after `first` seconds, each further one after `gap`; prompts of one token fail as it says."""

    health = HEALTH

    def __init__(self, first=0.02, gap=0.01):
        self.first, self.gap = first, gap
        self.running = self.most = 0

    async def stream(self, prompt, num_tokens):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if prompt == [1]:
                raise RequestError("refused")
            for index in range(num_tokens):
                await asyncio.sleep(self.gap if index else self.first)
                yield 1
                if prompt == [2]:
                    return
                if prompt == [3]:
                    await asyncio.sleep(60)
        finally:
            self.running -= 1


def run(target, jobs, max_concurrency=None, timeout=5.0):
    seen = []
    found = asyncio.run(
        run_jobs(
            target,
            jobs,
            request_rate=1.0,
            max_concurrency=max_concurrency,
            timeout=timeout,
            progress=seen.append,
        )
    )
    assert len(seen) == len(jobs) and target.running == 0
    return found


def test_times_are_those_of_the_target():
    found = run(TimedTarget(), [Job(0.0, [5, 5], 6), Job(0.03, [5], 3)])
    first, second = found.records
    assert (first.num_tokens, first.input_len, second.start >= 0.03) == (6, 2, True)
    for record in found.records:
        # a sleep never ends early; how late it ends depends on the machine
        assert record.error is None and record.ttft >= 0.02 and record.tpot >= 0.01
        assert record.e2el == pytest.approx(record.ttft + sum(record.itls))
        assert record.tpot == pytest.approx(np.mean(record.itls))
    assert found.duration >= first.e2el


def test_no_more_at_once_than_allowed_and_waiting_does_not_count():
    target = TimedTarget(first=0.03)
    found = run(target, [Job(0.0, [5], 2)] * 6, max_concurrency=2)
    assert target.most == 2
    starts = sorted(record.start for record in found.records)
    assert starts[2] >= 0.04 and starts[4] >= 0.08
    target = TimedTarget()
    run(target, [Job(0.0, [5], 2)] * 6)
    assert target.most == 6


def test_failures_are_told_apart():
    found = run(TimedTarget(), [Job(0.0, prompt, 4) for prompt in ([1], [2], [3], [4], [1])], timeout=0.5)
    errors = [record.error for record in found.records]
    assert errors == ["refused", "gave 1 of 4 tokens", "did not end within 0.5 s", None, "refused"]
    result = summarize(found)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (1, 4, 4)
    assert result["errors"] == {"refused": 2, "gave 1 of 4 tokens": 1, "did not end within 0.5 s": 1}
    report = Report(BenchOptions(), HEALTH, [found])
    assert report.num_failed == 4
    assert "failed at rate 1: 2 x refused" in report.table()


def a_run(rate, num_failed=0):
    records = [
        Record(10, 3, start=float(n), times=[n + 0.1, n + 0.2, n + 0.2 + 0.001 * n], num_tokens=3) for n in range(101)
    ]
    records += [Record(10, 3, start=1.0, error="lost") for _ in range(num_failed)]
    return Run(rate, records, duration=50.5)


def test_figures():
    result = summarize(a_run(2.0, num_failed=3))
    assert result["request_throughput"] == pytest.approx(2.0)
    assert result["output_throughput"] == pytest.approx(6.0)
    assert result["total_token_throughput"] == pytest.approx(26.0)
    assert result["p50_ttft_ms"] == pytest.approx(100) == pytest.approx(result["p99_ttft_ms"])
    for percentile in (50, 90, 99):  # the last gap is n milliseconds, n from 0 to 100
        assert result[f"p{percentile}_tpot_ms"] == pytest.approx(50 + percentile / 2)
        assert result[f"p{percentile}_e2el_ms"] == pytest.approx(200 + percentile)
    assert result["mean_itl_ms"] == pytest.approx(75)


def test_one_token_has_no_time_per_further_token():
    records = [Record(4, 1, times=[0.5], num_tokens=1)]
    result = summarize(Run(math.inf, records, 0.5))
    assert result["p50_tpot_ms"] is None and result["p50_itl_ms"] is None and result["p50_ttft_ms"] == 500
    assert " - " not in Report(BenchOptions(), HEALTH, [a_run(1.0)]).table()
    lines = Report(BenchOptions(), HEALTH, [Run(math.inf, records, 0.5)]).table().splitlines()
    assert lines[lines.index("time per output token, TPOT (ms)") + 1].split() == ["mean", "-"]


def test_the_table_has_a_column_per_rate():
    options = BenchOptions(request_rate=(2.0, math.inf), max_concurrency=8)
    lines = Report(options, HEALTH, [a_run(2.0), a_run(math.inf)]).table().splitlines()
    assert lines[0] == (
        "some-moe, float32, 2 ranks on cpu: 100 requests of 128 tokens, 64 generated, at most 8 at once"
    )
    assert lines[2].split() == ["request", "rate", "(req/s)", "2", "inf"]
    assert lines[lines.index("time to first token, TTFT (ms)") + 2].split() == ["p50", "100.00", "100.00"]
    assert len({len(line) for line in lines[2:9]}) == 1


@pytest.mark.parametrize("num_failed", [0, 2])
def test_files(tmp_path, num_failed):
    options = BenchOptions(request_rate=(2.0, math.inf))
    report = Report(options, HEALTH, [a_run(2.0), a_run(math.inf, num_failed)])
    save_report(report, tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    assert (content["format"], content["format_version"]) == ("moe_runtime.bench", 1)
    assert content["options"]["request_rate"] == [2.0, "inf"] and content["engine"] == HEALTH
    assert content["machine"]["cores"] >= 1
    first, second = content["results"]
    assert second["request_rate"] == "inf" and second["failed"] == num_failed
    assert len(second["requests"]) == 101 + num_failed
    assert first["requests"][3] == {
        "input_len": 10,
        "output_len": 3,
        "start": 3.0,
        "ttft": pytest.approx(0.1),
        "e2el": pytest.approx(0.203),
        "num_tokens": 3,
        "error": None,
    }


@pytest.mark.parametrize(
    "runs", [[a_run(2.0)], [a_run(math.inf, 2), a_run(1.0)], [Run(1.0, a_run(1, 2).records[-2:], 1.0)]]
)
def test_pictures(tmp_path, runs):
    path = tmp_path / "x.png"
    save_report(Report(BenchOptions(), HEALTH, runs), path)
    assert path.read_bytes().startswith(b"\x89PNG")
