"""The check of a cluster: over gloo with two ranks, and its verdicts on measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import SCRIPTS

SIZES = "--max-bytes 50000 --tokens 1 9 70 --hidden 32 --intermediate 24 --experts-per-rank 3 --top-k 2"


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONSAFEPATH": "1"}
    words = (SCRIPTS / "check_cluster.py", "--device", "cpu", *SIZES.split(), *words)
    return subprocess.run([*command, *map(str, words)], env=env, capture_output=True, text=True, timeout=200)


def test_two_ranks_over_gloo(tmp_path: Path) -> None:
    child = torchrun("--out", tmp_path)
    assert child.returncode == 0, child.stderr
    found = json.loads((tmp_path / "check_cluster.json").read_text())
    assert child.stdout == (tmp_path / "check_cluster.md").read_text()
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert {(link["source"], link["target"]) for link in found["links"]} == {(0, 1), (1, 0)}
    assert {row["nbytes"] for row in found["collectives"]} == {1024, 8192, 50000}
    assert all(row["us"] > 0 and row["bytes_per_s"] > 0 for row in found["collectives"])
    layers = {(row["dispatcher"], row["tokens"]): row["error"] for row in found["layers"]}
    assert set(layers) == {(way, n) for way in ("all_to_all", "all_gather", "padded") for n in (1, 9, 70)}
    assert all((error is not None) == (tokens <= 8) for (_, tokens), error in layers.items())
    assert {"level": "ok", "what": "layer", "text": "3 results of 3 dispatchers right"} in found["verdicts"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--device", "cpu"], "this is no rank; start it with torchrun"), (["--top-k", "9"], "")],
)
def test_what_cannot_be_checked_is_said_in_a_line(words: list[str], message: str) -> None:
    if message:
        child = subprocess.run(
            [sys.executable, SCRIPTS / "check_cluster.py", *words], capture_output=True, text=True, timeout=100
        )
        assert child.returncode == 2 and message in child.stderr
    else:
        child = torchrun(*words)
        assert child.returncode != 0 and "--top-k 9 is not allowed; there are fewer experts" in child.stderr


@pytest.fixture
def cluster(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from cluster import measure, verdicts

    ranks = [
        measure.RankFacts(r, f"host{r // 2}", "H100", 80 * 10**9, {"torch": "2.9", "NCCL": "2.27"}, [r ^ 1], 100.0)
        for r in range(4)
    ]
    links = [measure.Link(s, t, 300e9 if s // 2 == t // 2 else 40e9) for s in range(4) for t in range(4) if s != t]
    times = [
        measure.CollectiveTime(name, nbytes, us, rate)
        for name in ("all_to_all", "all_gather")
        for nbytes, us, rate in ((1024, 30.0, 1e6), (1 << 26, 2000.0, 35e9))
    ]
    layers = [
        measure.LayerTime(name, tokens, us, 1e-3)
        for name in ("all_to_all", "all_gather", "padded")
        for tokens, us in ((8, 200.0), (2048, 3000.0))
    ]
    return verdicts, ranks, links, times, layers


def levels(verdicts: list[Any]) -> dict[str, str]:
    """What was said of what is not ok: one verdict each here."""
    bad = [verdict for verdict in verdicts if verdict.level != "ok"]
    return {verdict.what: f"{verdict.level} {verdict.text}" for verdict in bad}


def test_nothing_to_say_of_a_sound_cluster(cluster: Any) -> None:
    verdicts, *measured = cluster
    found = verdicts.judge("cuda", *measured)
    assert {verdict.level for verdict in found} == {"ok"}
    assert [v.what for v in found] == [
        *("devices", "compute", "links", "links", "latency", "bandwidth", "layer"),
    ]


@pytest.mark.parametrize(
    ("part", "index", "changes", "what", "text"),
    [
        (0, 2, {"versions": {"torch": "2.8", "NCCL": "2.27"}}, "versions", "wrong torch differs: 2.9 (ranks 0, 1, 3)"),
        (0, 3, {"device": "A100"}, "devices", "look they differ"),
        (0, 1, {"matrix_us": 150.0}, "compute", "look rank 1 on host0 multiplies 1.5x slower"),
        (0, 2, {"peers": []}, "links", "look no direct access between ranks 2 and 3"),
        (0, 0, {"peers": []}, "links", "look no direct access between ranks 0 and 1"),
        (1, 0, {"bytes_per_s": 20e9}, "links", "look within a host, slower than half of the median 300 GB/s: 0 to 1"),
        (1, 1, {"bytes_per_s": 15e9}, "links", "look between hosts, slower than half of the median 40 GB/s: 0 to 2"),
        (2, 0, {"us": 900.0}, "latency", "look all_to_all of 1024 bytes takes 900 us, more than the 250 us"),
        (2, 1, {"bytes_per_s": 4e9}, "bandwidth", "look the largest all_to_all sends 4 GB/s from each rank, 0.10 of"),
        (3, 4, {"error": 0.5}, "layer", "wrong padded with 8 tokens a rank is off by 0.5"),
        (3, 4, {"error": float("inf")}, "layer", "wrong padded with 8 tokens a rank is off by inf"),
        (3, 2, {"us": 900.0}, "dispatcher", "look with 8 tokens a rank, all_to_all takes 200 us and all_gather"),
    ],
)  # fmt: skip
def test_what_is_amiss_is_named(cluster: Any, part: int, index: int, changes: Any, what: str, text: str) -> None:
    verdicts, *measured = cluster
    measured[part] = list(measured[part])
    measured[part][index] = replace(measured[part][index], **changes)
    found = levels(verdicts.judge("cuda", *measured))
    assert found[what].startswith(text), found
