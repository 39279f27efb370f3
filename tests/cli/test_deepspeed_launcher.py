"""Start under `deepspeed --num_gpus N --module`: works as under torchrun, over gloo on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from places import SUPPORT
from process_tools import Script, eventually
from tiny_models import VOCAB, make_model, save

from moe_runtime.cli.launch import Torchrun, run_torchrun, under_torchrun
from moe_runtime.config.engine import EngineConfig

LAUNCHER = str(Path(sys.prefix) / "bin" / "deepspeed")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """Starts a module over two hosts; no process and no folder may be left in the end."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    scripts: list[Script] = []

    def start(*module: str) -> Script:
        command = [LAUNCHER, "--num_gpus", "2", "--master_port", str(free_port()), "--module", *module]
        scripts.append(Script(command, tmp_path, {"TMPDIR": str(folder), "PYTHONSAFEPATH": "1"}))
        return scripts[-1]

    yield start
    left = [script.left() for script in scripts]
    for script in scripts:
        script.close()
    folders = list(folder.glob("moe-runtime-*"))
    shutil.rmtree(folder)
    assert left == [[] for _ in scripts] and folders == []


def command_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def ask(url: str, body: dict[str, object] | None = None) -> dict[str, object] | None:
    """The answer, or None while nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except (ConnectionError, urllib.error.URLError):
        return None


def test_serve_answers_and_stops(launch: Callable[..., Script], tmp_path: Path) -> None:
    model = make_model("qwen3")
    save(model, tmp_path / "model")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--skip-tokenizer-init", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    script = launch("moe_runtime", "serve", str(tmp_path / "model"), *options)
    assert eventually(lambda: ask(f"{url}/ready") or script.process.poll() is not None, 90), script.output
    health = ask(f"{url}/health")
    assert health is not None and len(health["ranks"]) == 2, health

    prompt = torch.randint(2, VOCAB, (9,)).tolist()
    body = {"prompt_token_ids": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    answer = ask(f"{url}/generate", body)
    model.generation_config.max_length = None
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert answer is not None and answer["token_ids"] == expected[0, len(prompt) :].tolist()

    fronts = [pid for pid in script.left() if b"--local_rank=0" in command_of(pid)]
    assert len(fronts) == 1
    os.kill(fronts[0], signal.SIGTERM)
    assert script.wait(40) == 0, script.output


@pytest.mark.slow  # test_torchrun.py kills ranks of the same hosts
def test_a_rank_killed_with_9_is_named_and_ends_all(launch: Callable[..., Script]) -> None:
    script = launch("fake_front")
    script.wait_for("ready")
    pid = script.values("ranks")[1]
    os.kill(pid, signal.SIGKILL)
    assert script.wait(40) not in (0, None)
    assert f"error: rank 1 (pid {pid}) was killed by SIGKILL" in script.output


def test_sigterm_to_the_launcher_stops_all_hosts_cleanly(launch: Callable[..., Script]) -> None:
    script = launch("fake_front")
    script.wait_for("ready")
    launchers = [pid for pid in script.left() if b"deepspeed.launcher.launch" in command_of(pid)]
    assert len(launchers) == 1
    os.kill(launchers[0], signal.SIGTERM)
    assert script.wait(40) == 1  # which is the launcher's own way
    assert "host 0 ends with 0" in script.output and "host 1 ends with 0" in script.output


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What DeepSpeed's launcher sets for the third of four processes, two on each of two nodes."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {
        "RANK": "2",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_SIZE": "2",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_launcher_is_known_by_its_environment(environment: pytest.MonkeyPatch) -> None:
    assert under_torchrun()
    found = Torchrun.from_environment()
    assert (found.launcher, found.rank, found.local_rank, found.local_world_size) == ("deepspeed", 2, 0, 2)
    assert not found.one_node
    environment.delenv("LOCAL_SIZE")
    assert not under_torchrun()


def test_two_nodes_stop_cleanly(tmp_path: Path) -> None:
    """The processes that launchers would start on two nodes of one rank each, played on this one."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_SIZE": "2", "MASTER_ADDR": "localhost"}
    ports = {"MASTER_PORT": "29500", "MOE_RUNTIME_CONTROL_PORT": str(free_port()), "TMPDIR": str(folder)}
    front = str(SUPPORT / "fake_front.py")
    nodes = [
        Script([sys.executable, front], tmp_path, {**common, **ports, "RANK": str(rank), "CROSS_RANK": str(rank)})
        for rank in range(2)
    ]
    nodes[0].wait_for("ready")
    for node in reversed(nodes):
        os.kill(node.process.pid, signal.SIGTERM)
    codes = [node.wait(20) for node in nodes]
    left = [node.left() for node in nodes]
    for node in nodes:
        node.close()
    shutil.rmtree(folder)
    assert codes == [0, 0] and left == [[], []], nodes[0].output + nodes[1].output
    assert len(nodes[0].values("stepped")) == 2


def test_another_ep_size_than_the_launchers_is_refused(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^ep_size: 2 is not allowed under deepspeed with 4 processes"):
        run_torchrun(EngineConfig(model="demo", ep_size=2), lambda config, make: 0)
