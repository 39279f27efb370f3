"""Compiles the native CPU kernels into the user's cache, once per instruction set, compiler and source."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_runtime.system.cache_folder import default_cache_dir

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
LOCK_DEADLINE_S = 300.0
COMPILE_DEADLINE_S = 240.0

# Average rows of an expert per pass. More rows would not use its weights better, and would take more memory.
EXPERT_ROWS = 128

_COMMON = (
    f"-DMOE_EXPERT_ROWS={EXPERT_ROWS} "
    "-std=c++17 -O3 -Wall -Wextra -fPIC -shared -pthread -fvisibility=hidden -fno-strict-aliasing "
    # Fuse a product and a sum only where the source says so, otherwise results would depend on the compiler.
    "-ffp-contract=off -mavx2 -mfma -mf16c -mbmi -mbmi2"
)
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq"
# Best first: the flags that the processor must report, and the compiler's options.
_AVX2_FLAGS = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512_FLAGS = _AVX2_FLAGS | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
INSTRUCTION_SETS: dict[str, tuple[frozenset[str], str]] = {
    "amx_bf16": (
        _AVX512_FLAGS | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
        f"{_AVX512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8",
    ),
    "avx512_bf16": (_AVX512_FLAGS | {"avx512_vnni", "avx512_bf16"}, f"{_AVX512} -mavx512vnni -mavx512bf16"),
    "avx512": (_AVX512_FLAGS, _AVX512),
    "avx_vnni": (_AVX2_FLAGS | {"avx_vnni"}, "-mavxvnni"),
    "avx2": (_AVX2_FLAGS, ""),
}


class NativeUnavailableError(RuntimeError):
    """The native kernels are not available here; one line says why."""


def supported_instruction_sets() -> list[str]:
    """The names in `INSTRUCTION_SETS` that this processor and its operating system support, best first."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return []
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
    return [name for name, (needed, _) in INSTRUCTION_SETS.items() if needed <= flags]


def can_have_kernels() -> bool:
    """Whether this machine has a processor and a compiler that the kernels can use; compiles nothing."""
    try:
        return bool(supported_instruction_sets() and find_compiler())
    except NativeUnavailableError:
        return False


def ensure_library(instruction_set: str | None = None, cache_dir: Path | None = None) -> tuple[Path, str]:
    """Path of the compiled library, and the instruction set it is for; compiles it on first use.

    Several processes may call it at once: one compiles, the others wait. The file's name ends in a checksum of its
    content. A file that does not match is damaged, perhaps by a full disk: loading it could end the process. It is
    compiled anew.

    Args:
        instruction_set: a name in `INSTRUCTION_SETS`; default the best one that the processor supports.
        cache_dir: default `$MOE_RUNTIME_CACHE`, else `$XDG_CACHE_HOME/moe-runtime`, else `~/.cache/moe-runtime`.

    Raises:
        NativeUnavailableError: the processor has no supported instruction set, or the compiler is missing or failed.
        ValueError: the processor lacks `instruction_set`.
    """
    supported = supported_instruction_sets()
    if instruction_set is None:
        if not supported:
            raise NativeUnavailableError("the processor has no AVX2, or the system is not Linux on x86-64")
        instruction_set = supported[0]
    elif instruction_set not in supported:
        raise ValueError(f"instruction_set: {instruction_set!r} is not allowed; this machine has {supported}")
    compiler, version = find_compiler()
    flags = f"{_COMMON} {INSTRUCTION_SETS[instruction_set][1]}".split()
    digest = hashlib.sha256("\0".join([compiler, version, *flags]).encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    name = f"cpu-{instruction_set}-{digest.hexdigest()[:16]}"
    try:
        library = _find_whole(cache_dir, name)
        if library is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _exclusive(cache_dir / "cpu-kernels.lock"):
                library = _find_whole(cache_dir, name) or _compile(compiler, flags, cache_dir, name)
    except OSError as error:
        raise NativeUnavailableError(f"cannot write to the cache folder {cache_dir}: {error}") from None
    return library, instruction_set


def _find_whole(cache_dir: Path, name: str) -> Path | None:
    """The compiled library of this name whose content has the checksum that its name ends in."""
    return next((file for file in sorted(cache_dir.glob(f"{name}-*.so")) if file.name == _name_of(file, name)), None)


def _name_of(file: Path, name: str) -> str:
    with file.open("rb") as content:
        return f"{name}-{hashlib.file_digest(content, 'sha256').hexdigest()[:16]}.so"


def find_compiler() -> tuple[str, str]:
    """Path of the C++ compiler (`$CXX`, else g++, else clang++) and the first line of its `--version`.

    Raises:
        NativeUnavailableError: there is none, or it does not run.
    """
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["g++", "clang++"]
    compiler = next((path for path in map(shutil.which, names) if path), None)
    if compiler is None:
        raise NativeUnavailableError(f"no C++ compiler: {' and '.join(names)} not found; CXX may name another")
    try:
        shown = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailableError(f"the C++ compiler does not run: {error}") from None
    return compiler, shown.partition("\n")[0]


def _compile(compiler: str, flags: list[str], cache_dir: Path, name: str) -> Path:
    """Compile the library; damaged ones of the same name are removed first."""
    damaged = list(cache_dir.glob(f"{name}-*.so"))
    for file in damaged:
        file.unlink()
    prefix = "the CPU kernels in the cache are damaged: " if damaged else ""
    what = f"{prefix}compiling the CPU kernels with {compiler} into {cache_dir}"
    logger.warning("%s (once; it takes some seconds)", what)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_dir) as folder:
        partial = Path(folder) / "library.so"
        command = [compiler, *flags, str(SOURCES / "api.cpp"), "-o", str(partial)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_DEADLINE_S, check=False)
        except subprocess.TimeoutExpired:
            raise NativeUnavailableError(f"{compiler} took more than {COMPILE_DEADLINE_S:.0f} s") from None
        if done.returncode:
            first_error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise NativeUnavailableError(f"{compiler} failed: {first_error.strip()}")
        library = partial.rename(cache_dir / _name_of(partial, name))
    logger.info("compiled the CPU kernels in %.1f s", time.monotonic() - start)
    return library


@contextmanager
def _exclusive(lock_path: Path) -> Iterator[None]:
    """Hold an advisory lock; the system releases it when the process ends, however it ends."""
    deadline = time.monotonic() + LOCK_DEADLINE_S
    with lock_path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NativeUnavailableError(
                        f"another process has held {lock_path} for {LOCK_DEADLINE_S:.0f} s"
                    ) from None
            time.sleep(0.1)
        yield
