"""Distribution of the cores, the hosts of rank processes, and the values of torchrun's environment."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from process_tools import eventually, running

from moe_runtime.cli.launch import run_torchrun, serve_torchrun, under_torchrun
from moe_runtime.cluster.host import FrontAddress, Host, _environment, describe_exit, divide_cores
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.server import ServerConfig
from moe_runtime.wire.transport import RankExited

FRONT = FrontAddress("ipc:///nowhere/front", "127.0.0.1")


def ranks(code: str, before: str = "pass") -> tuple[str, ...]:
    """A command whose ranks run `code`."""
    return (
        sys.executable,
        "-P",
        "-c",
        f"import sys, os, signal, time; {before}; from moe_runtime.cluster.rank import fork_ranks; "
        f"fork_ranks(sys.argv[1:]); {code}",
    )


SLEEPER = ranks("time.sleep(3600)")


@given(st.lists(st.integers(0, 4096), min_size=1, max_size=200, unique=True).map(sorted), st.integers(1, 64))
def test_cores_are_shared_out(cores, num_ranks):
    shares = divide_cores(cores, num_ranks)
    assert len(shares) == num_ranks
    sizes = [len(share) for share in shares]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    if len(cores) >= num_ranks:
        assert [core for share in shares for core in share] == cores  # in order, each core once: contiguous
    else:
        uses = [sum(share.count(core) for share in shares) for core in cores]
        assert set(sizes) == {1} and max(uses) - min(uses) <= 1


@pytest.fixture
def torchrun(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment of the first of torchrun's two processes on one node."""
    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp(dir="/tmp"))
    values = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch
    Path(tempfile.gettempdir()).rmdir()  # which proves it empty


def test_torchrun_is_known_by_its_environment(torchrun):
    assert under_torchrun()
    torchrun.delenv("TORCHELASTIC_RUN_ID")
    assert not under_torchrun()


@pytest.mark.parametrize("ep_size", [3, 4])
def test_another_ep_size_than_torchruns_is_refused(torchrun, ep_size):
    with pytest.raises(ValueError, match=rf"^ep_size: {ep_size} is not allowed under torchrun with 2 processes"):
        serve_torchrun(EngineConfig(model="demo", ep_size=ep_size), ServerConfig())


@pytest.mark.parametrize("ep_size", [1, 2])
def test_ep_size_becomes_torchruns(torchrun, ep_size):
    seen = []
    code = run_torchrun(EngineConfig(model="demo", ep_size=ep_size), lambda config, make: seen.append(config) or 5)
    assert code == 5 and [config.ep_size for config in seen] == [2]


def test_a_folder_that_others_can_enter_is_refused(torchrun):
    def run_front(config, make_executor) -> int:
        (folder,) = Path(tempfile.gettempdir()).iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o755)
        with pytest.raises(ValueError, match=rf"^{folder}: is not allowed; it must be a directory"):
            run_torchrun(config, run_front)
        return 0

    assert run_torchrun(EngineConfig(model="demo"), run_front) == 0


def test_a_link_in_place_of_the_folder_is_refused(torchrun):
    def run_front(config, make_executor) -> int:
        (folder,) = Path(tempfile.gettempdir()).iterdir()
        target = folder.with_name("target")
        folder.rename(target)
        folder.symlink_to(target)
        with pytest.raises(ValueError, match="is not allowed; it must be a directory"):
            run_torchrun(config, run_front)
        folder.unlink()
        target.rename(folder)
        return 0

    assert run_torchrun(EngineConfig(model="demo"), run_front) == 0


@pytest.mark.parametrize("port", ["0", "65536", "http", ""])
def test_a_wrong_control_port_is_refused(torchrun, port):
    torchrun.setenv("LOCAL_WORLD_SIZE", "1")
    torchrun.setenv("MOE_RUNTIME_CONTROL_PORT", port)
    with pytest.raises(ValueError, match=rf"^MOE_RUNTIME_CONTROL_PORT: '{port}' is not allowed"):
        run_torchrun(EngineConfig(model="demo"), lambda config, make: 0)


def _host(command: tuple[str, ...], num_ranks: int = 1) -> Host:
    cores = sorted(os.sched_getaffinity(0))
    return Host(range(num_ranks), divide_cores(cores, num_ranks), FRONT, local_ranks=num_ranks, command=command)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("os._exit(0)", "ended with exit code 0"),
        ("os._exit(3)", "ended with exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
    ],
)
def test_a_host_tells_how_a_rank_ended(code, text):
    host = _host(ranks(code))
    assert eventually(lambda: host.exits, 10)
    assert describe_exit(host.exits[0]) == f"rank 0 (pid {host.pids[0]}) {text}"
    host.stop()


def test_a_host_keeps_the_order_of_ends():
    host = _host(SLEEPER, 3)
    for rank in (2, 0, 1):
        os.kill(host.pids[rank], signal.SIGKILL)
        assert eventually(lambda: host.exits and host.exits[-1].rank == rank, 10)  # noqa: B023
    assert host.exits == [RankExited(rank, host.pids[rank], -signal.SIGKILL) for rank in (2, 0, 1)]


def test_stop_kills_what_does_not_end_and_reaps_it(caplog):
    threads = threading.active_count()
    host = _host(SLEEPER, 2)
    assert all(map(running, host.pids))
    os.kill(host.pids[0], signal.SIGSTOP)
    host.stop(grace=0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in host.pids)  # not even as a zombie
    assert caplog.text.count("did not end within 0.1 s") == 2
    assert threading.active_count() == threads
    host.stop()


def test_what_cannot_be_run_is_an_error():
    threads, files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        _host(("/no/such/python",), 2)
    assert eventually(lambda: threading.active_count() == threads, 10)
    assert len(list(Path("/proc/self/fd").iterdir())) == files


def test_too_many_open_files_are_an_error(monkeypatch):
    def pipe():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pipe", pipe)
    with pytest.raises(OSError, match="Too many open files"):
        _host(SLEEPER)


def test_what_is_imported_before_the_fork_starts_no_thread_and_no_device(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    code = (
        "import os; from moe_runtime.cluster import rank; "
        "rank.run_rank = lambda make: print(len(os.listdir('/proc/self/task')), torch.cuda.is_initialized()); "
        "import torch; rank.main()"
    )
    command = (sys.executable, "-P", "-c", code)
    done = subprocess.run(command, env=_environment(FRONT), capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["1", "False"]


def test_ranks_that_are_never_started_have_ended_with_what_should_have_started_them():
    host = _host((sys.executable, "-S", "-c", "import os; os._exit(4)"), 2)
    assert eventually(lambda: len(host.exits) == 2, 10)
    assert [(exited.rank, exited.returncode) for exited in host.exits] == [(0, 4), (1, 4)]
    assert host.pids == [exited.pid for exited in host.exits]
    host.stop()


def test_ranks_end_with_the_process_that_they_were_forked_from():
    host = _host(SLEEPER, 2)
    pids = host.pids
    os.kill(parent(pids[0]), signal.SIGKILL)
    assert eventually(lambda: len(host.exits) == 2, 10)
    assert host.exits == [RankExited(rank, pids[rank], -signal.SIGKILL) for rank in (0, 1)]
    assert not any(map(running, pids))
    host.stop()


def test_a_rank_has_its_cores_and_its_threads(monkeypatch, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    text = "f'{sorted(os.sched_getaffinity(0))} {os.environ[\"OMP_NUM_THREADS\"]}'"
    command = ranks(f"open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w').write({text})")
    monkeypatch.setenv("MOE_RUNTIME_NUM_THREADS", "3")
    host = Host([0, 1], [[cores[0]], [cores[-1]]], FRONT, local_ranks=2, command=command)
    assert eventually(lambda: len(host.exits) == 2, 10)
    assert [(tmp_path / str(pid)).read_text() for pid in host.pids] == [f"[{cores[0]}] 3", f"[{cores[-1]}] 3"]
    host.stop()


def test_ranks_share_what_there_was_before_they_were_forked():
    host = _host(ranks("time.sleep(3600)", before="shared = b'x' * (96 << 20)"), 3)
    assert max(map(proportional_size, host.pids)) < 48 << 20
    host.stop(grace=0.0)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def proportional_size(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
