"""The front's bookkeeping of the pages of a rank's KV cache. The pages themselves are on the rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moe_runtime.memory.page_group import PageGroup


class PagePool:
    """Hands out page numbers `0 .. num_pages - 1`, each to one holder at a time."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\1" * num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. The caller must check `num_free` first."""
        assert count <= len(self._free), f"{count} pages asked for, {len(self._free)} are free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = False
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Return pages to the pool."""
        for page in reversed(pages):
            assert not self._is_free[page], f"page {page} is freed twice"
            self._is_free[page] = True
            self._free.append(page)


@dataclass(eq=False)
class HeldPages:
    """Pages of one page group that a sequence holds, in order of position. It has given the first `num_left` back."""

    num_left: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Pages so far, with those given back."""
        return self.num_left + len(self.pages)


class RankPages:
    """The pages of one rank: a pool for each page group.

    A sequence holds pages in each group: those of its positions so far, from the first one that its next row reads.
    """

    def __init__(self, groups: Sequence[PageGroup], num_pages: Sequence[int]) -> None:
        assert len(groups) == len(num_pages)
        self.groups = groups
        self.pools = [PagePool(count) for count in num_pages]

    def hold(self) -> list[HeldPages]:
        """The pages of a new sequence: none yet."""
        return [HeldPages() for _ in self.groups]

    def room(self, running: Iterable[tuple[Sequence[HeldPages], int]]) -> list[int]:
        """Free pages of each group, less one for each running sequence that will hold one more than now.

        Args:
            running: the pages of each sequence, and its length when it ends.
        """
        room = [pool.num_free for pool in self.pools]
        for sequence, length in running:
            for index, (group, held) in enumerate(zip(self.groups, sequence, strict=True)):
                room[index] -= group.most_decoding(min(held.end * group.block_size + 1, length)) > len(held.pages)
        return room

    def can_extend(self, sequence: Sequence[HeldPages], start: int, num_tokens: int) -> bool:
        """Whether there are pages for positions `start .. start + num_tokens` of a sequence."""
        return all(
            group.count(start + num_tokens) - held.end <= pool.num_free + group.first_read(start) - held.num_left
            for group, held, pool in zip(self.groups, sequence, self.pools, strict=True)
        )

    def extend(self, sequence: Sequence[HeldPages], start: int, num_tokens: int) -> list[list[int]]:
        """Take the pages for positions `start .. start + num_tokens` of a sequence, and return them for each group.

        The sequence first gives back what is behind its windows.
        """
        new_pages = []
        for group, held, pool in zip(self.groups, sequence, self.pools, strict=True):
            num_behind = group.first_read(start) - held.num_left
            pool.free(held.pages[:num_behind])
            del held.pages[:num_behind]
            held.num_left += num_behind
            new_pages.append(pool.allocate(group.count(start + num_tokens) - held.end))
            held.pages += new_pages[-1]
        return new_pages

    def release(self, sequence: Sequence[HeldPages]) -> None:
        """Take back all pages of a sequence."""
        for held, pool in zip(sequence, self.pools, strict=True):
            pool.free(held.pages)
