"""Files are read as the reference library reads them; what is damaged, or changes later, is one line and no signal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from moe_runtime.weights.checkpoint import READABLE, Checkpoint
from moe_runtime.weights.safetensors_file import SafetensorsFile

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
TENSORS = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from([*READABLE.values()])))


@settings(deadline=None, max_examples=40)
@given(what=TENSORS.filter(bool), data=st.data())
def test_equals_the_reference_library(
    tmp_path_factory: pytest.TempPathFactory,
    what: dict[str, tuple[tuple[int, ...], torch.dtype]],
    data: st.DataObject,
) -> None:
    what.pop("__metadata__", None)
    folder = tmp_path_factory.mktemp("model")
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in what.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint(folder)
    with safe_open(folder / "model.safetensors", "pt") as reference:
        assert set(SafetensorsFile(folder / "model.safetensors").tensors) == set(reference.keys())
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            found = source.read(name, shape)
            assert found.dtype == tensor.dtype and torch.equal(found, reference.get_tensor(name))
            first = data.draw(st.integers(0, shape[0]))
            rows = slice(first, data.draw(st.integers(first, shape[0])))
            assert torch.equal(source.read(name, shape, rows=rows), tensor[rows])
            if len(shape) > 1:
                index = data.draw(st.integers(0, shape[0] - 1))
                assert torch.equal(source.read(name, shape, index), tensor[index])
                assert torch.equal(source.read(name, shape, index, slice(0, 1)), tensor[index, :1])


def file_of(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({"a": torch.arange(1000.0), "b": torch.ones(3, 4).bfloat16()}, file)
    return file


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_damaged_header_is_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = file_of(tmp_path_factory.mktemp("model"))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated: ") as error:
            SafetensorsFile(file)
        assert "\n" not in str(error.value)
        return
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        found = SafetensorsFile(file).tensors
    except ValueError as error:
        assert "is damaged or truncated: " in str(error) and "\n" not in str(error)
    else:  # a changed name or an unused byte: all entries lie within the file
        assert all(tensor.start + tensor.nbytes <= len(content) for tensor in found.values())


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "X1", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], '
        b'"data_offsets": [2, 6]}}',
        b"[" * 100_000,
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"is damaged or truncated: "):
        SafetensorsFile(file)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def overwrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-100, os.SEEK_END)
        opened.write(b"x" * 50)


def replace(file: Path) -> None:
    other = file.with_name("other")
    shutil.copyfile(file, other)
    other.replace(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, r"has changed since it was opened \(\d+ bytes then, \d+ now\); restart"),
        (overwrite, r"has changed since it was opened; restart"),
        (replace, r"has changed since it was opened; restart"),
        (Path.unlink, r"cannot be read any more: No such file"),
    ],
)
def test_a_file_that_changes_is_not_read_any_more(tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    file = file_of(tmp_path)
    source = Checkpoint(tmp_path)
    before = source.read("a", (1000,))
    change(file)
    with pytest.raises(ValueError, match=words) as error:
        source.read("a", (1000,))
    assert "\n" not in str(error.value)
    assert torch.equal(before, torch.arange(1000.0)), "what was read is not part of the file"


def test_weights_in_use_outlive_the_file(tmp_path: Path) -> None:
    """In a process of its own, since a page of a mapped file that is gone ends a process."""
    save_file({"a": torch.ones(1 << 20)}, tmp_path / "model.safetensors")
    code = f"""
import os
from pathlib import Path
from moe_runtime.weights.checkpoint import Checkpoint
folder = Path({str(tmp_path)!r})
source = Checkpoint(folder)
kept = source.read("a", (1 << 20,))
os.truncate(folder / "model.safetensors", 0)
source.release_all()
print(int(kept.sum()))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(1 << 20)), done.stderr
