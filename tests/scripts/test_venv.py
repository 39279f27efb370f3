"""`scripts/_venv.sh` with a fake python, which records its arguments and replays pip output prepared by a test."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
# Started in the project's root; it lies in `fake/`, and in `.venv/bin/` once there is an environment.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> fake/calls
case $* in
  -c*) [ ! -e fake/unsupported ] ;;
  --version) echo "Python 3.12.1" ;;
  "-m venv --clear .venv")
    rm -rf .venv; mkdir -p .venv/bin; cp fake/python .venv/bin/python
    if [ -e fake/venv-fails ]; then echo "ensurepip is not available" >&2; exit 1; fi
    touch .venv/pip ;;
  "-m pip show pip") [ -e .venv/pip ] ;;
  "-m pip config list")
    if [ -e fake/config ]; then cat fake/config; else exec "$REAL_PYTHON" -m pip config list; fi ;;
  "-m pip install"*)
    step=rest; [[ $* == *" torch" ]] && step=torch
    cat "fake/$step-output"
    if [ -e fake/hangs ]; then touch fake/started; sleep 30; fi
    if [ -e "fake/$step-fails" ]; then echo "ERROR: No matching distribution found for $step" >&2; exit 1; fi ;;
  *) echo "not expected: $*" >&2; exit 99 ;;
esac
"""
TORCH_OUTPUT = """\
Looking in indexes: https://download.pytorch.org/whl/cpu
Collecting torch
  Downloading https://download.pytorch.org/whl/cpu/torch-2.13.0%2Bcpu-cp312-cp312-manylinux_2_28_x86_64.whl (188.1 MB)
Collecting filelock (from torch)
  Downloading https://download.pytorch.org/whl/filelock-3.20.0-py3-none-any.whl (16 kB)
Installing collected packages: filelock, torch
Successfully installed filelock-3.20.0 torch-2.13.0+cpu
"""
REST_OUTPUT = """\
Obtaining file:///somewhere
  Installing build dependencies: started
  Installing build dependencies: finished with status 'done'
Requirement already satisfied: torch>=2.9 in ./.venv/lib/python3.12/site-packages (from moe-runtime==0.1.0) (2.13.0+cpu)
Collecting matplotlib>=3.9 (from moe-runtime==0.1.0)
  Downloading matplotlib-3.10.8-cp312-cp312-manylinux_2_27_x86_64.whl.metadata (52 kB)
Downloading matplotlib-3.10.8-cp312-cp312-manylinux_2_27_x86_64.whl (8.7 MB)
Downloading transformers-5.0.0-py3-none-any.whl (12.4 MB)
Downloading big_source-1.2.tar.gz (20.0 MB)
Building wheels for collected packages: moe-runtime
  Building editable for moe-runtime (pyproject.toml): started
Installing collected packages: matplotlib, transformers, moe-runtime
Successfully installed matplotlib-3.10.8 moe-runtime-0.1.0 transformers-5.0.0
"""


class Project:
    """A folder with the project's scripts, a fake python, and no environment yet."""

    def __init__(self, root: Path):
        self.root = root
        self.driver = False
        self.variables: dict[str, str] = {}
        for name in ("scripts/_venv.sh", "scripts/_pip_progress", "pyproject.toml", "constraints.txt"):
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        self.fake = root / "fake"
        self.fake.mkdir()
        (self.fake / "python").write_text(FAKE_PYTHON)
        (self.fake / "python").chmod(0o755)
        (self.fake / "torch-output").write_text(TORCH_OUTPUT)
        (self.fake / "rest-output").write_text(REST_OUTPUT)
        self.set_config("")

    def set_config(self, lines: str) -> None:
        (self.fake / "config").write_text(lines)

    def command(self, extra: str = "", options: str = "set -euo pipefail") -> list[str]:
        driver = f"has_nvidia_driver() {{ {str(self.driver).lower()}; }}"
        return ["bash", "-c", f'{options}; source scripts/_venv.sh; {driver}; ensure_venv {extra}; echo "ready: $PY"']

    def environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        return own | {"PYTHON": "fake/python", "REAL_PYTHON": sys.executable, "TERM": "xterm"} | self.variables

    def run(self, extra: str = "", options: str = "set -euo pipefail") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(extra, options),
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installs(self) -> list[list[str]]:
        """Arguments of every `pip install` since the last call, without the options about what pip prints."""
        calls = self.fake / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        about_output = {"--disable-pip-version-check", "--no-warn-script-location", "--progress-bar", "off"}
        start = "-m pip install "
        return [
            [word for word in line.removeprefix(start).split() if word not in about_output]
            for line in lines
            if line.startswith(start)
        ]

    def stamps(self) -> list[str]:
        return sorted(path.name for path in (self.root / ".venv").glob(".installed-*"))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


TORCH = ["--index-url", CPU_WHEELS, "-c", "constraints.txt", "torch"]
REST = ["-c", "constraints.txt", "-e", "."]


@pytest.mark.parametrize("options", ["set -euo pipefail", ":"])
def test_no_driver_torch_comes_first_from_the_cpu_wheels(project: Project, options: str) -> None:
    done = project.run(options=options)
    assert done.returncode == 0, done.stderr
    assert project.installs() == [TORCH, REST]
    assert project.stamps() == [".installed-base"]
    assert done.stdout.splitlines()[-1] == f"ready: {project.root}/.venv/bin/python"


def test_extra_goes_to_the_second_call(project: Project) -> None:
    assert project.run("test").returncode == 0
    assert project.installs() == [TORCH, ["-c", "constraints.txt", "-e", ".[test]"]]
    assert project.stamps() == [".installed-test"]


def test_driver_one_call(project: Project) -> None:
    project.driver = True
    assert project.run().returncode == 0
    assert project.installs() == [REST]


@pytest.mark.parametrize("section", ["global", "install", ":env:"])
@pytest.mark.parametrize(
    "entry",
    [
        "index-url='https://example.org/simple'",
        "pypi-url='https://example.org/simple'",
        "extra-index-url='https://example.org/a\\nhttps://example.org/b'",
        "find-links='/opt/wheels'",
        "no-index='1'",
    ],
)
def test_configured_index_is_used_as_it_is(project: Project, section: str, entry: str) -> None:
    project.set_config(f"global.cert='/etc/ca.crt'\n{section}.{entry}\nglobal.timeout='9'\n")
    assert project.run().returncode == 0
    assert project.installs() == [REST]


def test_other_configuration_names_no_index(project: Project) -> None:
    project.set_config(
        "global.cert='/etc/index-url/find-links.crt'\n:env:.default-timeout='180'\nglobal.index-url=''\n"
        ":env:.disable-pip-version-check='1'\nglobal.constraint='/etc/constraints.txt'\nlist.no-index-of='x'\n"
    )
    assert project.run().returncode == 0
    assert project.installs() == [TORCH, REST]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PIP_INDEX_URL", "https://example.org/simple", [REST]),
        ("PIP_EXTRA_INDEX_URL", "https://example.org/simple", [REST]),
        ("PIP_FIND_LINKS", "wheels", [REST]),
        ("PIP_NO_INDEX", "1", [REST]),
        ("PIP_INDEX_URL", "", [TORCH, REST]),
        ("PIP_DEFAULT_TIMEOUT", "180", [TORCH, REST]),
    ],
)
def test_variables_as_the_real_pip_lists_them(
    project: Project, name: str, value: str, expected: list[list[str]]
) -> None:
    (project.fake / "config").unlink()
    project.variables = {"PIP_CONFIG_FILE": os.devnull, name: value}  # with this file pip reads no other
    assert project.run().returncode == 0
    assert project.installs() == expected


def test_installs_again_only_when_requirements_change(project: Project) -> None:
    project.run()
    assert len(project.installs()) == 2
    again = project.run()
    assert again.stdout == f"ready: {project.root}/.venv/bin/python\n"
    assert not (project.fake / "calls").exists()  # neither pip nor python

    for name in ("pyproject.toml", "constraints.txt"):
        with (project.root / name).open("a") as file:
            file.write("# changed\n")
        assert project.run().returncode == 0
        assert project.installs() == [TORCH, REST]

    assert project.run("test").returncode == 0
    assert project.stamps() == [".installed-base", ".installed-test"]


@pytest.mark.parametrize("options", ["set -euo pipefail", ":"])
@pytest.mark.parametrize(("step", "num_calls"), [("torch", 1), ("rest", 2)])
def test_failure_is_shown_and_tried_again(project: Project, step: str, num_calls: int, options: str) -> None:
    (project.fake / f"{step}-fails").touch()
    done = project.run(options=options)
    assert done.returncode == 1
    assert f"ERROR: No matching distribution found for {step}" in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: pip failed; all it said is in {project.root}/.venv/pip.log"
    assert len(done.stderr.splitlines()) <= 16
    assert "ready" not in done.stdout
    assert len(project.installs()) == num_calls
    assert project.stamps() == []

    (project.fake / f"{step}-fails").unlink()
    assert project.run().returncode == 0
    assert project.installs() == [TORCH, REST]
    assert project.stamps() == [".installed-base"]


def test_failed_update_is_tried_again_after_going_back(project: Project) -> None:
    project.run()
    before = (project.root / "pyproject.toml").read_text()
    (project.root / "pyproject.toml").write_text(before + "# changed\n")
    (project.fake / "rest-fails").touch()
    assert project.run().returncode == 1
    (project.fake / "rest-fails").unlink()
    project.installs()
    (project.root / "pyproject.toml").write_text(before)
    assert project.run().returncode == 0
    assert project.installs() == [TORCH, REST]


def test_interrupted_install_leaves_no_stamp(project: Project) -> None:
    (project.fake / "hangs").touch()
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *project.command()],  # tests run in the background may have it ignored
        cwd=project.root,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while not (project.fake / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
    output, _ = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "ready" not in output
    assert project.stamps() == []

    (project.fake / "hangs").unlink()
    project.installs()
    assert project.run().returncode == 0
    assert project.installs() == [TORCH, REST]


@pytest.mark.parametrize("half", ["no python", "no pip", "dangling link"])
def test_half_made_environment_is_made_anew(project: Project, half: str) -> None:
    project.run()
    project.installs()
    python = project.root / ".venv/bin/python"
    if half == "no pip":
        (project.root / ".venv/pip").unlink()
        (project.root / ".venv/.installed-base").unlink()
    else:
        python.unlink()
    if half == "dangling link":
        python.symlink_to("gone")
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("making .venv with Python 3.12.1 ...\n")
    assert project.installs() == [TORCH, REST]


def test_environment_that_cannot_be_made_is_tried_again(project: Project) -> None:
    (project.fake / "venv-fails").touch()
    for _ in range(2):
        done = project.run(options=":")
        assert done.returncode == 1
        assert done.stderr == "ensurepip is not available\n"
        assert project.installs() == []
    (project.fake / "venv-fails").unlink()
    assert project.run().returncode == 0


def test_unsupported_python_is_one_line(project: Project) -> None:
    (project.fake / "unsupported").touch()
    done = project.run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: Python 3.12.1 at fake/python is not supported; set PYTHON to a Python 3.11 to 3.13\n"
    )
    assert not (project.root / ".venv").exists()


def test_progress_in_place_of_chatter(project: Project) -> None:
    with (project.fake / "rest-output").open("a") as file:
        file.write("WARNING: Retrying (Retry(total=4, connect=None)) after connection broken by '...': /simple/x/\n")
    done = project.run()
    assert done.stderr == ""
    *lines, took, ready = done.stdout.splitlines()
    assert lines == [
        "making .venv with Python 3.12.1 ...",
        "installing torch's CPU build into .venv (there is no NVIDIA driver) ...",
        "  downloading torch-2.13.0+cpu (188.1 MB)",
        "  installing 2 packages",
        "installing moe-runtime and what it needs into .venv ...",
        "  downloading transformers-5.0.0 (12.4 MB)",
        "  downloading big_source-1.2.tar.gz (20.0 MB)",
        "  installing 3 packages",
        "  no answer from the package index, trying again",
    ]
    assert took.startswith("installed in ") and ready.startswith("ready")
    log = (project.root / ".venv/pip.log").read_text()
    assert log == (project.fake / "torch-output").read_text() + (project.fake / "rest-output").read_text()


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_progress_on_a_terminal(project: Project, term: str) -> None:
    feed = 'while IFS= read -r line; do echo "$line"; sleep 0.01; done < fake/rest-output'
    front, back = pty.openpty()
    with os.fdopen(front, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            ["bash", "-c", f"({feed}; sleep 1.2) | scripts/_pip_progress"],
            cwd=project.root,
            env=project.environment() | {"TERM": term},
            stdout=back,
        )
        os.close(back)
        output = b""
        while chunk := read_terminal(screen):
            output += chunk
    assert process.wait(20) == 0
    lines = output.decode().split("\r\n")
    kept = [line.split("\r\x1b[K")[-1] for line in lines]
    assert kept == [
        "  downloading transformers-5.0.0 (12.4 MB)",
        "  downloading big_source-1.2.tar.gz (20.0 MB)",
        "  installing 3 packages",
        "",
    ]
    shown = "".join(lines)
    if term == "dumb":
        assert "\r" not in shown and "\x1b" not in shown
    else:
        assert "\r\x1b[K  looking up matplotlib (" in shown
        assert "\r\x1b[K  downloading matplotlib-3.10.8 (8.7 MB) (" in shown
        assert "\r\x1b[K  building moe-runtime (" in shown
        assert re.search(r"\r\x1b\[K  \.\.\. \([1-9] s\)", shown)


def read_terminal(screen) -> bytes:
    """What has come; nothing once the other side is closed, which Linux reports as an error."""
    try:
        return screen.read(4096)
    except OSError:
        return b""
