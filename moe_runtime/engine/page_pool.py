"""The front's bookkeeping of the pages of one rank's KV cache. The pages themselves are on the rank."""

from __future__ import annotations


class PagePool:
    """Hands out page numbers `0 .. num_pages - 1`, each to one holder at a time."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\1" * num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. The caller must check `num_free` first."""
        assert count <= len(self._free), f"{count} pages asked for, {len(self._free)} are free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = False
        return pages

    def free(self, pages: list[int]) -> None:
        """Return pages to the pool."""
        for page in reversed(pages):
            assert not self._is_free[page], f"page {page} is freed twice"
            self._is_free[page] = True
            self._free.append(page)
