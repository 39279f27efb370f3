"""The wheel: one top-level name, all data files, every dependency declared; it installs and generates by itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import moe_runtime

ROOT = Path(moe_runtime.__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves its traces where it builds
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in tracked:
        if name.startswith("moe_runtime/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


def test_one_top_level_name_and_all_files(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"moe_runtime"}
    for file in (ROOT / "moe_runtime").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert str(file.relative_to(ROOT)) in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_import_is_a_declared_dependency(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        file = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = Parser().parsestr(archive.read(file).decode())
        sources = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")]
    declared = {
        re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")
        for requirement in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in requirement
    }
    imported = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - {"moe_runtime"}
    distributions = packages_distributions()
    used = {distributions[name][0].lower().replace("_", "-") for name in foreign}
    # What a declared package always brings itself is as good as declared.
    assert used - declared <= {"starlette", "pydantic-core"}, "imported, but not declared"
    assert declared - used <= {"triton", "pyyaml"} | used, "declared, but not imported"


def test_installs_and_generates_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """The dependencies come from this environment, by path, so that its own installation of us is not seen."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import moe_runtime; print(moe_runtime.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(home)
    command = home / "bin" / "moe-runtime"
    assert moe_runtime.__version__ in run(command, "--version", cwd=tmp_path)
    question = "What is the capital of France?"
    answer = run(
        command, "generate", "demo", "--prompt", question, "--temperature", "0", "--max-tokens", "8", cwd=tmp_path
    )
    assert "Paris" in answer
