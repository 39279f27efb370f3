"""Under torchrun: hosts of one fake rank each, the first with the front; on one node, and on two simulated nodes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from places import SUPPORT
from process_tools import Script, eventually

FRONT = str(SUPPORT / "fake_front.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    yield path
    left = list(path.glob("moe-runtime-*"))
    shutil.rmtree(path)
    assert left == []


@pytest.fixture
def torchrun(folder, tmp_path) -> Iterator[Callable[..., Script]]:
    """Starts torchrun over two hosts; nothing may be left of it in the end."""
    scripts: list[Script] = []

    def start(*options: str) -> Script:
        command = [*TORCHRUN, str(free_port()), FRONT, *options]
        scripts.append(Script(command, tmp_path, {"TMPDIR": str(folder)}))
        return scripts[-1]

    yield start
    left = [script.left() for script in scripts]
    for script in scripts:
        script.close()
    assert left == [[] for _ in scripts]


def test_a_clean_stop_of_the_first_host_ends_all_with_0(torchrun):
    script = torchrun()
    script.wait_for("ready")
    front = next(pid for pid in script.values("process") if _rank_of(pid) == 0)
    os.kill(front, signal.SIGTERM)
    assert script.wait(20) == 0, script.output
    assert len(script.values("stepped")) == 2
    assert "host 0 ends with 0" in script.output and "host 1 ends with 0" in script.output


def test_ctrl_c_stops_all_hosts_cleanly(torchrun):
    script = torchrun()
    script.wait_for("ready")
    os.kill(script.process.pid, signal.SIGINT)
    script.wait(20)  # torchrun itself never ends with 0 then
    assert len(script.values("stepped")) == 2
    assert "host 0 ends with 0" in script.output and "host 1 ends with 0" in script.output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_with_9_is_named_and_ends_all(torchrun, rank):
    script = torchrun()
    script.wait_for("ready")
    pid = script.values("ranks")[rank]
    os.kill(pid, signal.SIGKILL)
    assert script.wait(10) not in (0, None)
    assert f"error: rank {rank} (pid {pid}) was killed by SIGKILL" in script.output
    assert "host 1 ends with 1" in script.output


def test_a_front_that_cannot_start_ends_all_at_once(torchrun):
    script = torchrun("--fail")
    assert script.wait(20) != 0
    assert "model: no such checkpoint" in script.output


@pytest.fixture
def nodes(tmp_path, folder) -> Iterator[list[Script]]:
    """The processes that torchrun would start on two nodes of one rank each, ready."""
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "MOE_RUNTIME_CONTROL_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "none",
        "TMPDIR": str(folder),
    }
    scripts = [Script([sys.executable, FRONT], tmp_path, {**common, "RANK": str(rank)}) for rank in range(2)]
    scripts[0].wait_for("ready")
    yield scripts
    left = [script.left() for script in scripts]
    for script in scripts:
        script.close()
    assert left == [[], []]


def test_two_nodes_stop_cleanly(nodes):
    os.kill(nodes[1].process.pid, signal.SIGTERM)  # a host waits for the front's word
    os.kill(nodes[0].process.pid, signal.SIGTERM)
    assert [node.wait(10) for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
    assert len(nodes[0].values("stepped")) == 2


def test_a_rank_killed_on_another_node_is_named(nodes):
    pid = nodes[0].values("ranks")[1]
    os.kill(pid, signal.SIGKILL)
    assert [node.wait(10) for node in nodes] == [1, 1]
    assert f"error: rank 1 (pid {pid}) was killed by SIGKILL" in nodes[0].output


def test_a_host_ends_when_the_front_has_gone(nodes):
    nodes[0].process.kill()
    assert nodes[1].wait(10) == 1
    assert "the front has gone" in nodes[1].output
    assert eventually(lambda: not nodes[0].left(), 5)


def test_the_front_ends_when_a_host_has_gone(nodes):
    nodes[1].process.kill()
    assert nodes[0].wait(15) == 1
    assert "error: host of rank 1 has been silent for 2 s" in nodes[0].output
    assert eventually(lambda: not nodes[1].left(), 5)


def _rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(value.partition(b"=")[2] for value in environment if value.startswith(b"RANK=")))
