"""Memory pages of tensors and libraries."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MADV_DONTNEED, MADV_HUGEPAGE = 4, 14
HUGE_PAGE = 2 << 20


def release_pages(tensor: Tensor) -> None:
    """Give back the pages of a contiguous CPU tensor that is not needed any more; its values are lost.

    A checkpoint's tensor is a view of a mapped file: what was read of it counts as this process's memory until then.
    Pages that the tensor shares with its neighbours stay.
    """
    _advise(tensor, mmap.PAGESIZE, MADV_DONTNEED)


def release_mappings(files: Iterable[Path]) -> None:
    """Give back what was read of mapped files, which nobody may have written to; what is used again is read again."""
    for start, end in mappings_of(files):
        _madvise(start, end - start, MADV_DONTNEED)


def mappings_of(files: Iterable[Path]) -> list[tuple[int, int]]:
    """Start and end of what is mapped of files."""
    paths = {str(file.resolve()) for file in files}
    return [_range_of(fields) for fields in _fields("maps") if len(fields) == 6 and fields[5] in paths]


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages for a CPU tensor that was not written yet. Where the system grants none, nothing changes."""
    _advise(tensor, HUGE_PAGE, MADV_HUGEPAGE)


def library_mappings() -> frozenset[tuple[int, int]]:
    """Start and end of what is mapped of files, read-only."""
    return frozenset(_range_of(fields) for fields in _fields("maps") if _is_read_only_file(fields))


def release_library_pages(mappings: frozenset[tuple[int, int]]) -> None:
    """Give back what this process has read of its libraries' files. What is used again comes back, at a fault each.

    Starting reads most of a library once, to bind it; of torch that is 70 MB that count as this process's memory.

    Args:
        mappings: from an earlier look. Others are left alone: a library that is being loaded is mapped as a whole for a
            moment, the parts that will be written included. So are those of which a page was changed.
    """
    found, is_known = (0, 0), False
    for fields in _fields("smaps"):
        if not fields[0].endswith(":"):  # the next mapping
            found = _range_of(fields)
            is_known = _is_read_only_file(fields) and found in mappings
        elif is_known and fields[:2] == ["Anonymous:", "0"]:
            _madvise(found[0], found[1] - found[0], MADV_DONTNEED)


@contextmanager
def giving_memory_back() -> Iterator[None]:
    """Around loading: give back what was read of libraries before and after it, and then all memory that was freed."""
    libraries = library_mappings()
    release_library_pages(libraries)
    yield
    release_library_pages(libraries)
    give_freed_memory_back()


def give_freed_memory_back() -> None:
    """Give back all whole pages that were freed, also those between what is in use."""
    ctypes.CDLL(None).malloc_trim(0)


def _fields(listing: str) -> Iterator[list[str]]:
    """Of the lines of this process's "maps" or "smaps": range, rights, offset, device, inode, and the path if any."""
    for line in Path("/proc/self", listing).read_text().splitlines():
        yield line.split(maxsplit=5)


def _range_of(fields: list[str]) -> tuple[int, int]:
    start, end = (int(address, 16) for address in fields[0].split("-"))
    return start, end


def _is_read_only_file(fields: list[str]) -> bool:
    return fields[1] in ("r--p", "r-xp") and fields[4] != "0"


def _advise(tensor: Tensor, page: int, advice: int) -> None:
    """`madvise` on the whole pages within a tensor."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if size > 0:
        _madvise(start, size, advice)


def _madvise(start: int, size: int, advice: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
