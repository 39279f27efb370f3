"""Compiling the native kernels: once, by the first process that needs them; one clear line if it is not possible."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_runtime.kernels.cpu import library, loader

needs_instructions = pytest.mark.skipif(not library.supported_instruction_sets(), reason="no AVX2")


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def has_compiler() -> bool:
    try:
        library.find_compiler()
    except library.NativeUnavailableError:
        return False
    return True


@needs_instructions
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_two_processes_compile_once_and_leave_one_whole_file(tmp_path):
    code = "from moe_runtime.kernels.cpu import library; print(library.ensure_library()[0])"
    compiler = write_compiler(tmp_path / "cxx", f"sleep 2; {copy_of(library.ensure_library()[0])}")
    cache = {"MOE_RUNTIME_CACHE": str(tmp_path / "new" / "cache"), "CXX": compiler}
    environment = os.environ | cache | {"PYTHONSAFEPATH": "1"}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ended = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], ended
    out = {stdout.decode().strip() for stdout, _ in ended}
    assert sum(stderr.decode().count("compiling the CPU kernels") for _, stderr in ended) == 1
    assert len(out) == 1
    assert names_in(tmp_path / "new" / "cache") == {"cpu-kernels.lock", Path(out.pop()).name}
    assert loader.load().library.moe_num_threads() >= 1


@pytest.mark.skipif(len(library.supported_instruction_sets()) < 2, reason="there is one set")
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_the_next_set_is_taken_if_the_best_one_is_not_to_be_had(monkeypatch, caplog):
    """As with a compiler that does not know the processor's newest instructions."""
    best, second = library.supported_instruction_sets()[:2]
    ensure = library.ensure_library

    def ensure_all_but_the_best(name: str | None = None) -> tuple[Path, str]:
        if name == best:
            raise library.NativeUnavailableError("the compiler failed")
        return ensure(name)

    monkeypatch.setattr(loader, "ensure_library", ensure_all_but_the_best)
    loader.load.cache_clear()
    try:
        assert loader.load().instruction_set == second
        with pytest.raises(library.NativeUnavailableError, match="the compiler failed"):
            loader.load(best)
    finally:
        loader.load.cache_clear()
    assert caplog.messages == [f"no native CPU kernels for {best}: the compiler failed"]


@needs_instructions
def test_without_a_compiler_there_is_one_reason(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(library.NativeUnavailableError, match=r"no C\+\+ compiler: no-such-compiler not found"):
        library.ensure_library()
    loader.load.cache_clear()
    loader.load_or_none.cache_clear()
    try:
        assert loader.load_or_none() is None and loader.load_or_none() is None
    finally:
        loader.load_or_none.cache_clear()
    assert [record.message for record in caplog.records] == [
        "no native CPU kernels, torch runs instead: no C++ compiler: no-such-compiler not found; CXX may name another"
    ]


def write_compiler(path, body):
    path.write_text(f"#!/bin/sh\nif [ \"$1\" = --version ]; then echo 'fake 1.0'; exit 0; fi\n{body}\n")
    path.chmod(0o755)
    return str(path)


@needs_instructions
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "cxx", "echo 'api.cpp:1: error: no such flag' >&2; exit 1"))
    cache = tmp_path / "cache"
    with pytest.raises(library.NativeUnavailableError, match=r"cxx failed: api.cpp:1: error: no such flag"):
        library.ensure_library(cache_dir=cache)
    assert names_in(cache) == {"cpu-kernels.lock"}


@needs_instructions
def test_a_compiler_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "cxx", "exec sleep 60"))
    monkeypatch.setattr(library, "COMPILE_DEADLINE_S", 0.2)
    with pytest.raises(library.NativeUnavailableError, match="took more than 0 s"):
        library.ensure_library(cache_dir=tmp_path / "cache")


@needs_instructions
def test_the_file_is_named_after_compiler_and_source(tmp_path, monkeypatch):
    """Another compiler, flag or source has another name, so what it made is never taken for this one's."""
    compiler = write_compiler(tmp_path / "cxx", 'while [ $# -gt 1 ]; do shift; done; touch "$1"')
    monkeypatch.setenv("CXX", compiler)
    first, instruction_set = library.ensure_library(cache_dir=tmp_path)
    assert first.exists() and instruction_set in first.name
    assert library.ensure_library(cache_dir=tmp_path)[0] == first
    script = tmp_path / "cxx"
    script.write_text(script.read_text().replace("fake 1.0", "fake 1.1"))
    assert library.ensure_library(cache_dir=tmp_path)[0] != first


def copy_of(file):
    """The script of a compiler that makes `file`, since compiling takes most of a test's time."""
    return f'while [ $# -gt 1 ]; do shift; done; cp {file} "$1"'


def damage_by_truncating(file):
    os.truncate(file, file.stat().st_size // 2)


def damage_by_writing(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@needs_instructions
@pytest.mark.parametrize("damage", [damage_by_truncating, damage_by_writing, lambda file: file.write_bytes(b"")])
def test_a_damaged_library_is_compiled_anew(tmp_path, monkeypatch, caplog, damage):
    """A process that loads a truncated library may die of a signal, without a word."""
    script = 'while [ $# -gt 1 ]; do shift; done; echo "the library" > "$1"'
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "cxx", script))
    whole, _ = library.ensure_library(cache_dir=tmp_path)
    content = whole.read_bytes()
    damage(whole)
    caplog.clear()
    caplog.set_level("WARNING", "moe_runtime.kernels.cpu.library")
    again, _ = library.ensure_library(cache_dir=tmp_path)
    assert again == whole and again.read_bytes() == content
    (record,) = caplog.records
    assert record.getMessage().startswith("the CPU kernels in the cache are damaged: compiling the CPU kernels with ")
    library.ensure_library(cache_dir=tmp_path)
    assert len(caplog.records) == 1, "a whole one is taken as it is"
    assert names_in(tmp_path) == {"cxx", "cpu-kernels.lock", whole.name}


@needs_instructions
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_a_process_survives_a_truncated_library(tmp_path):
    code = "from moe_runtime.kernels.cpu import loader; print(loader.load().library.moe_num_threads() >= 1)"
    script = copy_of(library.ensure_library()[0])
    environment = os.environ | {
        "MOE_RUNTIME_CACHE": str(tmp_path),
        "PYTHONSAFEPATH": "1",
        "CXX": write_compiler(tmp_path / "cxx", script),
    }
    for _ in range(2):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
        (file,) = tmp_path.glob("*.so")
        damage_by_truncating(file)


@needs_instructions
def test_a_lock_that_is_not_released_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "LOCK_DEADLINE_S", 0.2)
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "cxx", "exit 1"))
    with (
        library._exclusive(tmp_path / "cpu-kernels.lock"),
        pytest.raises(library.NativeUnavailableError, match=r"another process has held .*cpu-kernels.lock"),
    ):
        library.ensure_library(cache_dir=tmp_path)


@needs_instructions
def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(library.NativeUnavailableError, match=r"cannot write to the cache folder .*file/cache"):
        library.ensure_library(cache_dir=tmp_path / "file" / "cache")


def test_an_instruction_set_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(library, "supported_instruction_sets", lambda: ["avx2"])
    with pytest.raises(ValueError, match=r"instruction_set: 'avx512' is not allowed; this machine has \['avx2'\]"):
        library.ensure_library("avx512")
    monkeypatch.setattr(library, "supported_instruction_sets", list)
    with pytest.raises(library.NativeUnavailableError, match="no AVX2"):
        library.ensure_library()
