"""Memory pages of tensors and libraries."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MADV_DONTNEED, MADV_HUGEPAGE = 4, 14
HUGE_PAGE = 2 << 20


def release_pages(tensor: Tensor) -> None:
    """Release the pages of a contiguous CPU tensor that is no longer needed; its values are lost.

    The part of a mapped file that was read counts as this process's memory until it is released. Pages shared with
    neighbouring data stay.
    """
    _advise(tensor, mmap.PAGESIZE, MADV_DONTNEED)


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages for a CPU tensor that was not written yet. If the system grants none, nothing changes."""
    _advise(tensor, HUGE_PAGE, MADV_HUGEPAGE)


def library_mappings() -> frozenset[tuple[int, int]]:
    """Start and end of each read-only mapping of a file."""
    return frozenset(_range_of(fields) for fields in _fields("maps") if _is_read_only_file(fields))


def release_library_pages(mappings: frozenset[tuple[int, int]]) -> None:
    """Release the pages that this process has read of its libraries' files. A page used again costs one page fault.

    Loading a library reads most of it once, for symbol binding. For torch, 70 MB count as this process's memory.

    Args:
        mappings: the result of an earlier `library_mappings`. Other mappings are left alone, since a library that is
            being loaded is briefly mapped as a whole, including parts that will be written. Mappings with a modified
            page are left alone too.
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
    """Wraps loading: release library pages before and after it, and then all freed memory."""
    libraries = library_mappings()
    release_library_pages(libraries)
    yield
    release_library_pages(libraries)
    give_freed_memory_back()


def give_freed_memory_back() -> None:
    """Release all whole pages that were freed, including those between allocations in use."""
    ctypes.CDLL(None).malloc_trim(0)


def _fields(listing: str) -> Iterator[list[str]]:
    """The fields of each line of this process's "maps" or "smaps": range, rights, offset, device, inode, any path."""
    for line in Path("/proc/self", listing).read_text().splitlines():
        yield line.split(maxsplit=5)


def _range_of(fields: list[str]) -> tuple[int, int]:
    start, end = (int(address, 16) for address in fields[0].split("-"))
    return start, end


def _is_read_only_file(fields: list[str]) -> bool:
    return fields[1] in ("r--p", "r-xp") and fields[4] != "0"


def _advise(tensor: Tensor, page: int, advice: int) -> None:
    """Call `madvise` on the whole pages within a tensor."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if size > 0:
        _madvise(start, size, advice)


def _madvise(start: int, size: int, advice: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
