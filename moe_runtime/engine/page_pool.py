"""The front's bookkeeping of the pages of a rank's KV cache. The pages themselves are on the rank.

Several sequences may hold a page whose tokens they share. A page that nobody holds is free. While it is indexed, its
content can be found and held again; it is handed out only after the pages without content, least recently used first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moe_runtime.engine.prefix_index import PrefixIndex
from moe_runtime.memory.page_group import PageGroup


class PagePool:
    """Page numbers `0 .. num_pages - 1` with the number of holders of each.

    Attributes:
        index: finds pages by their content.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.index = PrefixIndex()
        self._blank = list(range(num_pages - 1, -1, -1))  # pages that nobody holds and the index does not know
        self._num_holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + self.index.num_idle

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages that nobody holds. The caller must check `num_free` first."""
        assert count <= self.num_free, f"{count} pages asked for, {self.num_free} are free"
        pages = [self._blank.pop() if self._blank else self.index.evict() for _ in range(count)]
        for page in pages:
            self._num_holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages that the index has found, once more."""
        for page in pages:
            assert page in self.index
            if not self._num_holders[page]:
                self.index.wake(page)
            self._num_holders[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Hold pages once less. Of those that nobody holds then, the last one is handed out first."""
        for page in reversed(pages):
            assert self._num_holders[page], f"page {page} is freed twice"
            self._num_holders[page] -= 1
            if not self._num_holders[page]:
                if page in self.index:
                    self.index.rest(page)
                else:
                    self._blank.append(page)

    def num_held(self, pages: Iterable[int]) -> int:
        """How many of the pages somebody holds."""
        return sum(self._num_holders[page] > 0 for page in pages)

    def num_freed(self, pages: Iterable[int]) -> int:
        """How many of these pages, which a sequence holds, nobody else holds."""
        return sum(self._num_holders[page] == 1 for page in pages)

    def forget(self) -> None:
        """Empty the index. Pages that are held stay so."""
        self._blank += self.index.clear()


@dataclass(eq=False)
class HeldPages:
    """Pages of one page group that a sequence holds, in order of position. It has given the first `num_left` back, or
    never held them."""

    num_left: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Pages so far, with those given back."""
        return self.num_left + len(self.pages)


@dataclass(frozen=True)
class Hit:
    """The first tokens of a sequence whose keys and values are in pages of a rank.

    Attributes:
        num_tokens: how many; 0 for a miss.
        pages: of each page group, those that the sequence can share.
        sources: of each page group, the page whose front has the tokens after the last shared page, to be copied; empty
            if there are none.
    """

    num_tokens: int
    pages: list[HeldPages]
    sources: list[int] = field(default_factory=list)


class RankPages:
    """The pages of one rank: a pool for each page group.

    A sequence holds pages in each group: those of its positions so far, from the first one that its next row reads.
    """

    def __init__(self, groups: Sequence[PageGroup], num_pages: Sequence[int]) -> None:
        assert len(groups) == len(num_pages)
        self.groups = groups
        self.pools = [PagePool(count) for count in num_pages]

    def miss(self) -> Hit:
        """No pages for a new sequence."""
        return Hit(0, [HeldPages() for _ in self.groups])

    def find(self, keys: Sequence[bytes], num_tokens: int, tail: bytes | None) -> Hit:
        """The longest beginning of a sequence that is in pages, so that its next row finds all that it reads.

        A group with a window needs only the pages that this row reads.

        Args:
            keys: of the full pages of the sequence's first `num_tokens` tokens.
            tail: of the page after them with the remaining tokens; None if no token remains.
        """
        end = min((self._reach(keys, pool) for group, pool in self._each() if group.window is None), default=len(keys))
        if tail is not None and end == len(keys) and self._last_missing(keys, num_tokens) is None:
            sources = [page for pool in self.pools if (page := pool.index.find(tail)) is not None]
            if len(sources) == len(self.pools):
                return Hit(num_tokens, self._pages(keys, num_tokens), sources)
        size = self.groups[0].block_size
        while (missing := self._last_missing(keys, end * size)) is not None:
            end = missing
        return Hit(end * size, self._pages(keys, end * size))

    def hold(self, hit: Hit | None = None) -> list[HeldPages]:
        """The pages of a new sequence: those of its hit, if any."""
        hit = hit or self.miss()
        for held, pool in zip(hit.pages, self.pools, strict=True):
            pool.share(held.pages)
        return hit.pages

    def add_to_index(self, sequence: Sequence[HeldPages], first: int, keys: Sequence[bytes]) -> None:
        """Index the pages of a sequence from number `first` on by these keys, except for those given back."""
        for held, pool in zip(sequence, self.pools, strict=True):
            for number, key in enumerate(keys, first):
                if number >= held.num_left:
                    pool.index.add(key, held.pages[number - held.num_left])

    def most_needed(self, hit: Hit, num_tokens: int) -> list[int]:
        """Of each group, free pages that a new sequence takes at most until it has `num_tokens`.

        Pages of its hit that somebody holds already take no free page. Behind a window they count: they may be given
        back while others still hold them.
        """
        return [
            group.most(num_tokens) - (pool.num_held(held.pages) if group.window is None else 0)
            for group, held, pool in zip(self.groups, hit.pages, self.pools, strict=True)
        ]

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
            group.count(start + num_tokens) - held.end
            <= pool.num_free + pool.num_freed(held.pages[: group.first_read(start) - held.num_left])
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

    def forget(self) -> None:
        """Empty the index of every group."""
        for pool in self.pools:
            pool.forget()

    def _each(self) -> Iterable[tuple[PageGroup, PagePool]]:
        return zip(self.groups, self.pools, strict=True)

    @staticmethod
    def _reach(keys: Sequence[bytes], pool: PagePool) -> int:
        """How many of the first keys have pages."""
        return next((number for number, key in enumerate(keys) if pool.index.find(key) is None), len(keys))

    def _last_missing(self, keys: Sequence[bytes], position: int) -> int | None:
        """The last page within a window of the row at `position`, before its own, that is not indexed, or None."""
        end = position // self.groups[0].block_size
        for group, pool in self._each():
            first = end if group.window is None else group.first_read(position)
            for number in range(end - 1, first - 1, -1):
                if pool.index.find(keys[number]) is None:
                    return number
        return None

    def _pages(self, keys: Sequence[bytes], position: int) -> list[HeldPages]:
        """The indexed pages that the row at `position` reads, without the one that it is in."""
        found = []
        for group, pool in self._each():
            first = group.first_read(position)
            pages = [pool.index.find(key) for key in keys[first : position // group.block_size]]
            found.append(HeldPages(first, [page for page in pages if page is not None]))
            assert len(found[-1].pages) == len(pages)
        return found
