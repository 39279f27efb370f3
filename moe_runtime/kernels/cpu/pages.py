"""Memory pages of tensors and libraries."""

from __future__ import annotations

import ctypes
import mmap
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


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages for a CPU tensor that was not written yet. Where the system grants none, nothing changes."""
    _advise(tensor, HUGE_PAGE, MADV_HUGEPAGE)


def release_library_pages() -> None:
    """Give back what this process has read of its libraries' files. What is used again comes back, at a fault each.

    Starting reads most of a library once, to bind it; of torch that is 70 MB that count as this process's memory.
    Only files that are mapped read-only, and of which no page was changed, are given back.
    """
    start, end, is_read_only_file = 0, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):  # the next mapping
            start, end = (int(address, 16) for address in fields[0].split("-"))
            is_read_only_file = fields[1] in ("r--p", "r-xp") and fields[4] != "0"
        elif fields[:2] == ["Anonymous:", "0"] and is_read_only_file:
            _madvise(start, end - start, MADV_DONTNEED)


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
