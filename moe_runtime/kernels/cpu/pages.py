"""Memory pages of tensors."""

from __future__ import annotations

import ctypes
import mmap

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


def _advise(tensor: Tensor, page: int, advice: int) -> None:
    """`madvise` on the whole pages within a tensor."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
