"""The parts of the benchmark against other engines that need no engine: floors, check, stopwatch, tables."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from places import SCRIPTS

CONFIG = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "vocab_size": 32000,
}

MODULES = ("peers", "make_bench_model", "bench_model")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of `scripts/peers`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"peers.{name}")

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]


def rates(floor: ModuleType, all_cores: float = 80e9, rank: float = 40e9):
    return floor.Rates(all_cores, rank, 10 * all_cores, 10 * rank)


@pytest.mark.parametrize("shape", ["bench", "bench-mla", "bench-gpt-oss", "olmoe"])
def test_sizes_are_those_of_the_checkpoint(peers, shape):
    make = importlib.import_module("make_bench_model")
    config = make.SHAPES[shape].config()
    sizes = peers("sizes").Sizes.of(config)
    numel = {name: int(np.prod(size)) for name, size in make.SHAPES[shape].tensors()}
    experts = sum(count for name, count in numel.items() if ".experts." in name)
    sparse = config["num_hidden_layers"] - config.get("first_k_dense_replace", 0)
    num_experts = next(config[key] for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in config)
    assert sizes.expert * sparse * num_experts == experts
    assert sizes.expert_rows == sparse * config["num_experts_per_tok"]
    assert sizes.head == numel["lm_head.weight"]
    assert sizes.dense == sum(numel.values()) - experts - 2 * sizes.head  # the embedding is as large as the head
    if shape != "olmoe":
        assert sum(numel.values()) == pytest.approx(1.31e9, rel=0.03)


def test_attention_of_a_latent_and_of_a_window(peers):
    make, sizes_of = importlib.import_module("make_bench_model"), peers("sizes").Sizes.of
    latent = sizes_of(make.SHAPES["bench-mla"].config())
    assert latent.kept(100) == 100 * 12 * (512 + 64)  # a latent and a rotated key per token and layer
    assert latent.step_scores(100) == 100 * 12 * 16 * (128 + 64 + 128)
    sinks = sizes_of(make.SHAPES["bench-gpt-oss"].config())
    assert sinks.kept(100) == 100 * 12 * 2 * 8 * 64
    assert sinks.kept(1000) == (1000 + 128) * 6 * 2 * 8 * 64  # every other layer sees 128 keys at most
    for length in (1, 128, 129, 300):
        seen = sum(6 * (context + min(context, 128)) for context in range(1, length + 1))
        assert sinks.prompt_scores(length) == seen * 2 * 32 * 64
        assert sinks.prompt_scores(length) == sum(sinks.step_scores(context) for context in range(1, length + 1))


def test_decode_floor_of_one_rank_is_bytes_over_bandwidth(peers):
    floor = peers("floor")
    sizes = floor.Sizes.of(CONFIG)
    step = floor.decode_step_seconds(sizes, rates(floor), floor.Routing(12 * 8, 12 * 8), batch=1, context=160, ranks=1)
    nbytes = 2 * (sizes.dense + sizes.head + 96 * 3 * 1024 * 512 + 160 * 2 * 12 * 4 * 64)
    assert step == pytest.approx(nbytes / 80e9)


def test_prefill_floor_of_a_long_prompt_is_operations_over_rate(peers):
    floor = peers("floor")
    sizes = floor.Sizes.of(CONFIG)
    length, rows = 2048, 2048 * 12 * 8
    seconds = floor.prefill_seconds(
        sizes, rates(floor), floor.Routing(768, 768), floor.Routing(rows, rows), batch=1, length=length, ranks=1
    )
    attention = 12 * 2 * 16 * 64 * length * (length + 1) / 2
    flops = 2 * (length * sizes.dense + sizes.head + attention + rows * sizes.expert)
    assert seconds == pytest.approx(flops / 800e9)


def test_two_ranks_wait_for_the_busiest_and_share_the_bandwidth(peers):
    floor = peers("floor")
    sizes = floor.Sizes.of(CONFIG)

    def step(batch: int, touched: object, **speed: float) -> float:
        return floor.decode_step_seconds(sizes, rates(floor, **speed), touched, batch=batch, context=1, ranks=2)

    even, skewed = floor.Routing(200, 100), floor.Routing(200, 150)
    assert step(2, skewed) - step(2, even) == pytest.approx(2 * 50 * sizes.expert / 40e9)
    # One sequence: its rank reads the dense weights alone, at its own rate.
    alone = step(1, even) - 2 * 200 * sizes.expert / 80e9
    assert alone == pytest.approx(2 * (sizes.dense + sizes.head + sizes.kv) / 40e9)
    # Where memory gives no more to two than to one, both together are the limit.
    assert step(2, even, all_cores=40e9) == pytest.approx(
        (4 * (sizes.dense + sizes.head + sizes.kv) + 2 * 200 * sizes.expert) / 40e9
    )


def test_rates_are_the_mean_of_both_sides(peers):
    floor = peers("floor")
    names = ("bytes_per_s_all", "bytes_per_s_rank", "flops_per_s_all", "flops_per_s_rank")
    found = floor.Rates.mean(dict.fromkeys(names, 1.0), dict.fromkeys(names, 3.0))
    assert found == floor.Rates(2.0, 2.0, 2.0, 2.0)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def answer(logprobs_PTV: np.ndarray) -> list:
    ids_PTN = np.argsort(-logprobs_PTV, axis=-1)[..., :20]
    return [
        [[ids.tolist(), row[ids].tolist()] for ids, row in zip(ids_TN, rows_TV, strict=True)]
        for ids_TN, rows_TV in zip(ids_PTN, logprobs_PTV, strict=True)
    ]


def test_check_tells_rounding_from_other_weights(peers):
    check = peers("check")
    source = np.random.default_rng()
    logits = 3 * source.standard_normal((2, 31, 1000))
    rounded = log_softmax(logits + 0.02 * source.standard_normal(logits.shape))
    other = log_softmax(3 * source.standard_normal(logits.shape))
    reference = log_softmax(logits).astype(np.float32)
    same = check.compare(reference, answer(reference))
    assert same.agrees and same.mean_kl == pytest.approx(0, abs=1e-5) and same.rms_logprob == pytest.approx(0, abs=1e-6)
    assert check.compare(reference, answer(rounded)).agrees
    assert not check.compare(reference, answer(other)).agrees
    repeated = [[[[*ids, ids[0]], [*values, values[0]]] for ids, values in rows] for rows in answer(rounded)]
    assert check.compare(reference, repeated) == check.compare(reference, answer(rounded))


def test_stopwatch_counts_decode_from_the_last_first_token(peers):
    watch = peers("protocol").Stopwatch(3)
    for sequences in ([0, 1], [0, 1, 2], [0, 1, 2], [2]):
        watch.step(sequences)
    found = watch.result()
    assert found["decode_tokens"] == 4 and found["prefill_s"] > 0 and found["decode_s"] > 0


def sample(engine: str, repetition: int, speed: float, floor: float, phase: str = "decode") -> dict:
    return {
        "repetition": repetition,
        "case": "8 x 128",
        "engine": engine,
        "phase": phase,
        "tokens_per_s": speed,
        "floor_tokens_per_s": floor,
        "of_floor": speed / floor,
        "rates": {"bytes_per_s_all": 80e9, "flops_per_s_all": 900e9},
    }


@pytest.fixture
def results() -> dict:
    # The machine is twice as slow in the second repetition; pairs see that, medians of each alone would not.
    speeds = {"ours": [100.0, 50.0, 90.0], "vllm": [50.0, 20.0, 45.0]}
    floors = [200.0, 100.0, 150.0]
    return {
        "machine": {"date": "2026-01-01", "cpu": "a CPU", "memory_gib": 24, "system": "Linux"},
        "threads": 2,
        "shape": "bench",
        "repetitions": 3,
        "engines": ["ours", "vllm"],
        "info": {"ours": {"version": "1"}, "vllm": {"version": "2"}},
        "agreement": {"ours": {"mean_kl": 0.001, "max_kl": 0.01, "rms_logprob": 0.05, "agrees": True}},
        "samples": [
            sample(engine, repetition, speed, floors[repetition], phase)
            for phase in ("prefill", "decode")
            for engine, found in speeds.items()
            for repetition, speed in enumerate(found)
        ],
    }


def test_table_pairs_repetitions(peers, results):
    report = peers("report")
    table = report.phase_table(results, "decode")
    assert "| 8 x 128 | ours | 90.0 (50.0 to 100) | 150 | 0.50 (0.50 to 0.60) |  |" in table
    assert "| 8 x 128 | vllm | 45.0 (20.0 to 50.0) | 150 | 0.25 (0.20 to 0.30) | 2.00 |" in table
    assert report.phase_table({**results, "samples": []}, "decode") == ""
    text = report.markdown(results)
    assert "| ours | 0.00100 | 0.01000 | 0.0500 | yes |" in text and "read 80 (80 to 80) GB/s" in text


def test_report_names_engines_that_do_not_run_the_model(peers, results):
    text = peers("report").markdown(results | {"absent": {"vllm": "no latent attention"}})
    assert "Not run: vllm (no latent attention)." in text


def test_plot_is_a_picture(peers, results, tmp_path):
    peers("report").plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


ECHO = """
import time
from peers.protocol import serve, take_stdout
answers = take_stdout()
print("a library's banner")
def ticks(seconds):
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        count += 1
    return count
serve(answers, {"echo": lambda text: text, "ticks": ticks, "fail": lambda: 1 / 0})
"""


@pytest.fixture
def driver(peers, tmp_path):
    drivers = peers("drivers")
    (tmp_path / "echo_engine.py").write_text(ECHO)
    log = tmp_path / "echo.log"
    environment = {"PYTHONPATH": f"{SCRIPTS}:{tmp_path}"}
    with drivers.Driver(
        "echo", Path(sys.executable), "echo_engine", [], environment=environment, log=log, deadline_s=30
    ) as found:
        yield found


def test_driver_answers_and_stands_still_between_commands(driver):
    assert driver.call("echo", text="héllo") == "héllo"
    assert driver.call("ticks", seconds=0.01) > 0
    assert "a library's banner" in driver.log.read_text()
    stat = Path(f"/proc/{driver._process.pid}/stat")
    deadline = time.monotonic() + 10
    while stat.read_text().rpartition(")")[2].split()[0] != "T":  # stopped
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_driver_that_dies_is_an_error_with_its_traceback(driver, peers):
    with pytest.raises(peers("drivers").DriverError, match="ZeroDivisionError"):
        driver.call("fail")


def test_command_line_refuses_a_run_without_us():
    done = subprocess.run(
        [sys.executable, "-m", "peers", "--engines", "vllm"],
        env={"PYTHONPATH": str(SCRIPTS), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "--engines: 'ours' is missing" in done.stderr


def test_counts_of_rows_are_per_step_layer_and_expert(peers):
    count = peers("ours_engine")._counts
    chosen_BSLK = np.array([[[[0, 1]], [[1, 2]]], [[[1, 3]], [[1, 2]]]])  # two sequences, two steps, one layer
    assert count(chosen_BSLK, 4).tolist() == [[[1, 2, 0, 1]], [[0, 2, 2, 0]]]
