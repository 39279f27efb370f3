"""What the machine can lack, and what can happen to files. Each case has a server of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path

from served.server import Server

from abuse.processes import RANKS, last_error
from abuse.tools import answer, check
from moe_runtime.demo.checkpoint import ensure_demo_model


def mounted(options: str, folder: str) -> tuple[str, ...]:
    """A command that runs another one with a tmpfs on `folder`, which nobody else sees."""
    script = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
    return ("unshare", "-m", "sh", "-c", script, folder)


def read_only_cache() -> str:
    """a kernel cache that is empty and cannot be written"""
    with tempfile.TemporaryDirectory() as folder:
        env = {"MOE_RUNTIME_CACHE": folder}
        with Server(str(ensure_demo_model()), *RANKS, env=env, wrapper=mounted("ro,size=1m", folder)) as server:
            return _serves_with(server, "native")


def no_compiler() -> str:
    """an empty kernel cache and no compiler"""
    with tempfile.TemporaryDirectory() as folder:
        env = {"MOE_RUNTIME_CACHE": folder, "CXX": "/nonexistent/g++"}
        with Server(str(ensure_demo_model()), *RANKS, env=env) as server:
            return _serves_with(server, "native")


def small_shm() -> str:
    """/dev/shm of 64 KiB"""
    with Server("demo", *RANKS, wrapper=mounted("size=64k", "/dev/shm")) as server:
        found = _serves_with(server, "/dev/shm")
    with Server("demo", *RANKS, "--dispatcher", "symmetric", wrapper=mounted("size=64k", "/dev/shm"), waits=False) as s:
        code, line = s.wait(), last_error(s)
    check(code in (1, 2), f"exit code {code}")
    return f"{found}; with `--dispatcher symmetric` exit code {code}: `{line}`"


def damaged_checkpoint() -> str:
    """a checkpoint whose weights are cut in half"""
    with tempfile.TemporaryDirectory() as folder:
        path = copy_of_demo(folder)
        weights = path / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        with Server(str(path), *RANKS, waits=False) as server:
            code, line = server.wait(), last_error(server)
    check(code == 2, f"exit code {code}")
    return f"exit code 2: `{line.replace(folder, 'FOLDER')}`"


def replaced_checkpoint() -> str:
    """a checkpoint that is renamed away while it is mapped; then experts move"""
    with tempfile.TemporaryDirectory() as folder:
        path = copy_of_demo(folder)
        with Server(str(path), *RANKS, "--redundant-experts", "2") as server:
            known = answer(server)
            (path / "model.safetensors").rename(path / "old.safetensors")
            (path / "model.safetensors").write_bytes(b"damaged")
            moved = rebalance(server)
            check(answer(server) == known, "the answer has changed")
            check(server.stop() == 0, "it did not end cleanly")
    return f"the answer stays the same; {moved}"


def cut_checkpoint() -> str:
    """a checkpoint that is cut in half in place while it is mapped; then experts move"""
    with tempfile.TemporaryDirectory() as folder:
        path = copy_of_demo(folder)
        with Server(str(path), *RANKS, "--redundant-experts", "2") as server:
            known = answer(server)
            weights = path / "model.safetensors"
            os.truncate(weights, weights.stat().st_size // 2)
            try:
                moved = rebalance(server)
            except OSError as error:  # the server answers with an error, or not at all
                moved = str(error)
            time.sleep(2)
            if server.process.poll() is None:
                check(answer(server) == known, "the answer has changed")
                return f"the answer stays the same; {moved}"
            code, line = server.wait(), last_error(server)
    check(code == 1, f"exit code {code}")
    return f"exit code 1: `{line}`"


def copy_of_demo(folder: str) -> Path:
    return Path(shutil.copytree(ensure_demo_model(), Path(folder) / "demo"))


def rebalance(server: Server) -> str:
    request = urllib.request.Request(f"{server.url}/experts/rebalance", b"{}", {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        found = json.loads(reply.read())
    moved, undone = (len(found[name] or ()) for name in ("moves", "rollbacks"))
    return f"{moved} of {found['planned_moves']} planned moves, {undone} rollbacks"


def _serves_with(server: Server, word: str) -> str:
    """The server answers, ends cleanly, and has one log line with `word` as a warning."""
    check(answer(server, 120) != "", "no answer")
    check(server.stop() == 0, "it did not end cleanly")
    lines = [line for line in server.log.splitlines() if "WARNING" in line and word in line]
    check(bool(lines), f"no line about it: {server.log[-1500:]}")
    said = lines[0].partition("WARNING ")[2].partition(": ")[2]
    said = re.sub("/tmp/[^ :']+", "FOLDER", said)
    return f"it serves; the log says `{said}`"


CASES = (read_only_cache, no_compiler, small_shm, damaged_checkpoint, replaced_checkpoint, cut_checkpoint)
