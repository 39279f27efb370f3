"""Memory returned to the system: pages read from files are dropped and come back; adjacent memory is unchanged."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from moe_runtime.system import pages
from moe_runtime.system.cache_folder import default_cache_dir

PAGE = mmap.PAGESIZE


def resident(file: Path) -> int:
    """Bytes of this process's mappings of a file that are in memory, by smaps."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            ours = fields[-1] == str(file)
        elif ours and fields[0] == "Rss:":
            total += int(fields[1]) << 10
    return total


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A file, its values, and a tensor mapped over it of which every page was read."""
    file = tmp_path.resolve() / "values"
    values = torch.randint(0, 256, (64 * PAGE,), dtype=torch.uint8)
    file.write_bytes(values.numpy().tobytes())
    tensor = torch.from_file(str(file), shared=True, size=len(values), dtype=torch.uint8)
    assert torch.equal(tensor, values)
    return file, values, tensor


def test_pages_shared_with_neighbours_stay(mapped: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    file, values, tensor = mapped
    assert resident(file) == 64 * PAGE
    pages.release_pages(tensor[PAGE // 2 : 5 * PAGE + 1])  # pages 1 to 4 are whole
    assert resident(file) == 60 * PAGE
    pages.release_pages(tensor[10 * PAGE : 11 * PAGE - 1])
    pages.release_pages(tensor[::2])  # not contiguous
    assert resident(file) == 60 * PAGE
    assert torch.equal(tensor, values)


def test_a_tensor_of_its_own_keeps_what_lies_around_the_released_part() -> None:
    whole = torch.ones(10 * PAGE, dtype=torch.uint8)
    pages.release_pages(whole[3 * PAGE : 7 * PAGE])
    assert whole[: 3 * PAGE].all() and whole[7 * PAGE :].all()
    assert whole.sum() <= 10 * PAGE - 3 * PAGE, "three whole pages at least were lost"


def test_libraries_run_on_after_their_pages_were_released() -> None:
    known = pages.library_mappings()
    assert known
    with pages.giving_memory_back():
        found = torch.arange(100.0).softmax(0)
    pages.release_library_pages(known)
    assert torch.equal(torch.arange(100.0).softmax(0), found)


def test_the_cache_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOE_RUNTIME_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "moe-runtime"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/moe-runtime")
    monkeypatch.setenv("MOE_RUNTIME_CACHE", "/own")
    assert default_cache_dir() == Path("/own")
