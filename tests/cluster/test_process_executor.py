"""The front's executor over real processes: fake ranks without a model, and one real process group."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import fake_rank
import gloo_rank
import numpy as np
import pytest
from fake_rank import fingerprint, model_config, step_plan
from places import SUPPORT
from process_tools import Script, eventually, running

from moe_runtime.cluster import rank_group
from moe_runtime.cluster.host import Host
from moe_runtime.cluster.process_executor import ProcessExecutor
from moe_runtime.config.engine import EngineConfig
from moe_runtime.system.signals import END_SIGNALS
from moe_runtime.wire.executor import CountsReport, RankError
from moe_runtime.wire.messages import SlotReport, SlotTask

NOWHERE = Path("/nowhere")
FRONT = [sys.executable, "-P", str(SUPPORT / "fake_front.py")]

Start = Callable[..., ProcessExecutor]


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Iterator[Path]:  # pytest makes its own folder first
    """The folder for temporary files, which must be empty in the end."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    left = list(path.iterdir())
    shutil.rmtree(path)
    assert left == []


@pytest.fixture
def start(folder, monkeypatch) -> Iterator[Start]:
    """Starts executors over fake ranks, and checks that nothing of them is left once they are closed."""
    started: list[ProcessExecutor] = []
    threads = threading.active_count()

    def start(num_ranks: int = 2, model: str = "fake", **options) -> ProcessExecutor:
        monkeypatch.setattr(rank_group, "_open_store", lambda address: SimpleNamespace(port=1))
        config = EngineConfig(model=model, ep_size=num_ranks, **options)
        executor = ProcessExecutor(config, model_config(), NOWHERE, command=fake_rank.COMMAND)
        started.append(executor)
        return executor

    yield start
    for executor in started:
        executor.close()
        assert not any(running(info.pid) for info in executor.ranks)
    assert threading.active_count() == threads


def test_ranks_say_hello_and_report(start):
    executor = start(3)
    assert [info.rank for info in executor.ranks] == [0, 1, 2]
    assert len({info.pid for info in executor.ranks} | {os.getpid()}) == 4
    assert executor.max_inflight == 2
    executor.check()


def test_each_rank_gets_its_own_plan_and_results_come_in_order_with_two_in_flight(start):
    executor = start(2)
    plans = [step_plan(step, 2, commands="0:late" if step % 2 else "1:late") for step in range(4)]
    executor.submit(plans[0])
    results = []
    for plan in plans[1:]:
        executor.submit(plan)
        results.append(executor.collect())
    results.append(executor.collect())
    for plan, of_step in zip(plans, results, strict=True):
        assert [(result.step, result.rank) for result in of_step] == [(plan.step, 0), (plan.step, 1)]
        for rank, result in enumerate(of_step):
            new = plan.ranks[rank].new_sequences[0]
            assert [(sample.seq_id, sample.token_id) for sample in result.samples] == [(rank, fingerprint(new))]


def test_expert_counts_of_every_rank(start):
    executor = start(3)
    executor.submit(step_plan(1, 3))
    executor.collect()
    counts = executor.expert_counts()
    assert counts.dtype == np.int64
    assert np.array_equal(counts, np.stack([np.full((2, 3, 4), 10**rank) for rank in range(3)]))


def test_ranks_forget_their_counts_and_reports_on_the_way(start):
    executor = start(2)
    executor.submit(step_plan(1, 2))
    executor.request_counts()
    executor.collect()
    executor.forget()
    assert executor.expert_counts().sum() == 0
    assert executor.reports() == []


def test_reports_come_beside_steps_and_counts(start):
    executor = start(2)
    executor.submit(step_plan(1, 2))
    executor.request_counts()
    executor.send_task(1, SlotTask(7, 0, 3, -1, 100))
    executor.submit(step_plan(2, 2))
    executor.send_task(0, SlotTask(8, 0, 3, -1, 100))
    assert [result.step for result in executor.collect() + executor.collect()] == [1, 1, 2, 2]
    assert executor.expert_counts().sum() == 2 * 24 * 11
    reports = executor.reports()
    counts = [report for report in reports if isinstance(report, CountsReport)]
    assert [(report.rank, report.counts_2LE.sum()) for report in sorted(counts, key=lambda report: report.rank)] == [
        (0, 24),
        (1, 240),
    ]
    tasks = [report for report in reports if isinstance(report, SlotReport)]
    assert {(report.rank, report.task_id, report.checksum) for report in tasks} == {(1, 7, 4), (0, 8, 3)}
    assert executor.reports() == []


def test_cores_are_divided_and_threads_follow(start, monkeypatch):
    cores = os.sched_getaffinity(0)
    infos = start(2).ranks
    shares = [{int(core) for core in info.kernels["cores"].split(",")} for info in infos]
    assert shares[0] | shares[1] == cores
    assert [info.num_threads for info in infos] == [len(share) for share in shares]
    monkeypatch.setenv("MOE_RUNTIME_NUM_THREADS", "3")
    assert [info.num_threads for info in start(2).ranks] == [3, 3]
    assert os.sched_getaffinity(0) == cores  # the front is not pinned


def test_a_wrong_number_of_threads_is_refused(start, monkeypatch):
    monkeypatch.setenv("MOE_RUNTIME_NUM_THREADS", "many")
    with pytest.raises(ValueError, match=r"^MOE_RUNTIME_NUM_THREADS: 'many' is not allowed"):
        start()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_idle_is_named(start, victim):
    executor = start(2)
    pid = executor.ranks[victim].pid
    os.kill(pid, signal.SIGKILL)
    text = rf"^rank {victim} \(pid {pid}\) was killed by SIGKILL$"
    with pytest.raises(RankError, match=text):
        eventually(executor.check, 2)
    with pytest.raises(RankError, match=text):  # for good
        executor.submit(step_plan(1, 2))


@pytest.mark.parametrize("other", ["hang", "raise", "late"])
def test_a_rank_killed_in_a_step_is_named_and_not_the_rank_that_complains(start, other):
    executor = start(2)
    executor.submit(step_plan(1, 2))
    executor.collect()
    executor.submit(step_plan(2, 2, commands=f"0:{other},1:hang"))
    threading.Timer(0.2, os.kill, (executor.ranks[1].pid, signal.SIGKILL)).start()
    before = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 1 \(pid \d+\) was killed by SIGKILL$"):
        executor.collect()
    assert time.monotonic() - before < 5  # not at the deadline of the step


def test_a_rank_that_exits_in_a_step_is_named_with_its_code(start):
    executor = start(2)
    executor.submit(step_plan(1, 2, commands="0:hang,1:exit"))
    with pytest.raises(RankError, match=r"^rank 1 \(pid \d+\) ended with exit code 3$"):
        executor.collect()


def test_a_rank_that_raises_is_named_with_its_error(start, capfd):
    executor = start(2)
    executor.submit(step_plan(1, 2, commands="1:raise"))
    with pytest.raises(RankError, match=r"^rank 1 failed: RuntimeError: connection closed by peer$"):
        executor.collect()
    executor.close()
    assert "Traceback" in capfd.readouterr().err  # the rank's own log has the rest


def test_a_rank_that_hangs_is_named_at_the_deadline(start, monkeypatch):
    monkeypatch.setattr(rank_group, "STOP_GRACE", 60.0)
    executor = start(3, step_timeout=0.5)
    executor.submit(step_plan(1, 3, commands="1:hang"))
    with pytest.raises(RankError, match=r"^step 1 did not end within 0.5 s: no answer from rank 1$"):
        executor.collect()
    before = time.monotonic()
    executor.close()
    assert time.monotonic() - before < 30  # there is nothing to wait for


def test_the_rank_that_others_wait_for_is_named(start):
    executor = start(3, step_timeout=0.5)
    pids = [info.pid for info in executor.ranks]
    os.kill(pids[2], signal.SIGSTOP)
    executor.submit(step_plan(1, 3, commands="0:hang"))  # as in a collective
    with pytest.raises(RankError) as error:
        executor.collect()
    assert str(error.value) == (
        f"step 1 did not end within 0.5 s: no answer from rank 2 (pid {pids[2]}), which is stopped; "
        "no answer from rank 0 either, which may wait for it"
    )


def test_an_idle_rank_that_is_stopped_is_named_when_counts_are_asked(start):
    executor = start(2, step_timeout=0.5)
    os.kill(executor.ranks[1].pid, signal.SIGSTOP)
    with pytest.raises(RankError, match=r"^expert counts did not come within 0.5 s: no answer from rank 1 .*stopped$"):
        executor.expert_counts()


def test_a_rank_that_refuses_the_model_makes_it_a_value_error(start, capfd):
    with pytest.raises(ValueError, match=f"^{fake_rank.REFUSAL}$"):
        start(2, model="0:hang,1:refuse")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("raise", "rank 0 failed: RuntimeError: connection closed by peer"),
        ("exit", r"rank 0 \(pid \d+\) ended with exit code 3"),
        ("kill", r"rank 0 \(pid \d+\) was killed by SIGKILL"),
    ],
)
def test_a_rank_that_dies_while_loading_is_named_at_once(start, command, message):
    before = time.monotonic()
    with pytest.raises(RankError, match=f"^{message}$"):
        start(2, model=f"0:{command},1:hang")
    assert time.monotonic() - before < 10


def test_a_rank_of_another_version_is_refused_by_name(start, monkeypatch):
    monkeypatch.setattr(rank_group, "__version__", "9.9")
    with pytest.raises(RankError, match=r"^rank \d \(pid \d+\) speaks protocol 1 of version .*; .* version 9\.9$"):
        start(2)


def test_a_rank_that_sends_noise_is_named(start, monkeypatch):
    noise = """
import sys, time, zmq
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
socket = zmq.Context().socket(zmq.DEALER)
socket.setsockopt_string(zmq.IDENTITY, "rank " + options["--rank"].partition(":")[0])
socket.connect(options["--control"])
socket.send_multipart([b"Hello", b"noise"])
time.sleep(3600)
"""
    monkeypatch.setattr(fake_rank, "COMMAND", (sys.executable, "-P", "-c", noise))
    with pytest.raises(RankError, match=r"^rank 0 sent a Hello that cannot be read: "):
        start(1)


def test_a_command_that_is_not_there_leaves_nothing(folder):
    threads = threading.active_count()
    config = EngineConfig(model="fake", ep_size=2)
    with pytest.raises(FileNotFoundError):
        ProcessExecutor(config, model_config(), NOWHERE, command=["/no/such/python"])
    assert eventually(lambda: threading.active_count() == threads, 5)


def test_close_ends_the_ranks_and_may_be_repeated(start, folder):
    executor = start(2)
    assert all(running(info.pid) for info in executor.ranks)
    (directory,) = folder.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    executor.close()
    assert not any(running(info.pid) for info in executor.ranks)
    assert not directory.exists()
    executor.close()


def test_close_with_steps_under_way_waits_for_them(start, caplog):
    executor = start(2)
    executor.submit(step_plan(1, 2, commands="0:late"))
    executor.submit(step_plan(2, 2, commands="1:late"))
    executor.close()
    assert caplog.text == ""


def test_close_kills_a_rank_that_does_not_end(start, caplog, monkeypatch):
    monkeypatch.setattr(rank_group, "STOP_GRACE", 3.0)  # rank 0 ends within it on a busy machine too
    executor = start(2)
    executor.submit(step_plan(1, 2, commands="1:hang"))
    executor.close()
    assert f"rank 1 (pid {executor.ranks[1].pid}) did not end within 3 s" in caplog.text
    assert "rank 0" not in caplog.text


def test_an_executor_that_is_dropped_closes_itself(folder, monkeypatch):
    monkeypatch.setattr(rank_group, "_open_store", lambda address: SimpleNamespace(port=1))
    config = EngineConfig(model="fake", ep_size=2)
    executor = ProcessExecutor(config, model_config(), NOWHERE, command=fake_rank.COMMAND)
    pids = [info.pid for info in executor.ranks]
    del executor
    assert not any(running(pid) for pid in pids)


@pytest.fixture
def front(folder, tmp_path) -> Iterator[Script]:
    """A front in a process of its own, with two fake ranks, ready."""
    script = Script(FRONT, tmp_path, {"TMPDIR": str(folder)})
    script.wait_for("ready")
    yield script
    script.close()
    shutil.rmtree(folder)  # a front killed with -9 cannot clean up
    folder.mkdir()


def test_ranks_do_not_outlive_a_front_killed_with_9(front):
    ranks = front.values("ranks")
    os.kill(ranks[0], signal.SIGSTOP)  # a rank that cannot even notice
    front.process.kill()
    assert eventually(lambda: not any(map(running, ranks)), 2)


def test_the_next_start_removes_what_a_front_killed_with_9_has_left(front, folder, tmp_path, monkeypatch):
    other = Script(FRONT, tmp_path, {"TMPDIR": str(folder)})  # it still runs
    other.wait_for("ready")
    front.process.kill()
    front.process.wait()
    left = set(folder.iterdir())
    assert len(left) == 2
    monkeypatch.setattr(rank_group, "_open_store", lambda address: SimpleNamespace(port=1))
    executor = ProcessExecutor(
        EngineConfig(model="fake", ep_size=1), model_config(), NOWHERE, command=fake_rank.COMMAND
    )
    (own,) = set(folder.iterdir()) - left
    (others,) = set(folder.iterdir()) & left
    assert others.is_dir()
    executor.close()
    assert not own.exists()
    os.killpg(other.process.pid, signal.SIGINT)
    assert other.wait(10) == 0 and other.left() == []
    other.close()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_lets_the_ranks_finish(front, number):
    os.killpg(front.process.pid, number)
    assert front.wait(10) == 0, front.output
    assert len(front.values("stepped")) == 2
    assert front.left() == []


@pytest.mark.parametrize("number", END_SIGNALS)
def test_a_rank_ignores_signals_from_its_first_moment(start, monkeypatch, number):
    def start_and_signal(*args, **options) -> Host:
        host = Host(*args, **options)
        assert len(host.pids) == 2
        for pid in host.pids:
            os.kill(pid, number)
        return host

    monkeypatch.setattr(rank_group, "Host", start_and_signal)
    executor = start(2)
    os.kill(executor.ranks[0].pid, number)
    executor.submit(step_plan(1, 2))
    assert len(executor.collect()) == 2


def test_ranks_meet_in_a_real_process_group_and_a_death_in_a_collective_is_named(folder):
    config = EngineConfig(model="fake", ep_size=2, device="cpu")
    executor = ProcessExecutor(config, model_config(), NOWHERE, command=gloo_rank.COMMAND)
    try:
        shares = rank_group.divide_cores(sorted(os.sched_getaffinity(0)), 2)
        assert [info.num_threads for info in executor.ranks] == [len(share) for share in shares]
        for step in (5, 6):
            executor.submit(step_plan(step, 2))
            assert [result.samples[0].token_id for result in executor.collect()] == [3 * step, 3 * step]
        executor.submit(step_plan(7, 2, commands="1"))
        with pytest.raises(RankError, match=r"^rank 1 \(pid \d+\) ended with exit code 7$"):
            executor.collect()
    finally:
        executor.close()
    assert not any(running(info.pid) for info in executor.ranks)
