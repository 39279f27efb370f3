"""Keys of pages, and the index that finds a page by its key. No torch, no ranks, no requests.

A page's key is a chained hash of everything that its keys and values depend on: all tokens up to its end, and what
else changes them. The hash is collision-safe, so a page that is found holds what its key says.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 32
TOKEN_CODE = "I"  # array's code of a token id


class PageKeys:
    """The keys of a sequence's pages, computed as they are asked for.

    Args:
        origin: what keys and values depend on besides the tokens, as a text that is different for different content.
        block_size: tokens per page.
    """

    def __init__(self, origin: str, block_size: int) -> None:
        self.block_size = block_size
        self._origin = blake2b(origin.encode(), digest_size=KEY_BYTES).digest()
        self._chain: list[bytes] = []

    def also(self, what: str) -> PageKeys:
        """Keys of a sequence whose keys and values depend on `what` besides."""
        keys = PageKeys(what, self.block_size)
        keys._origin = blake2b(self._origin + keys._origin, digest_size=KEY_BYTES).digest()
        return keys

    def full(self, token_ids: Sequence[int], count: int) -> list[bytes]:
        """Keys of the first `count` pages of a sequence, which must have tokens for all of them."""
        size = self.block_size
        assert count * size <= len(token_ids)
        while len(self._chain) < count:
            start = len(self._chain) * size
            self._chain.append(self._key(self._before(len(self._chain)), token_ids[start : start + size]))
        return self._chain[:count]

    def tail(self, token_ids: Sequence[int], end: int) -> bytes | None:
        """The key of a page that is filled only up to position `end`; None if a page ends there."""
        count, extra = divmod(end, self.block_size)
        assert end <= len(token_ids)
        if not extra:
            return None
        self.full(token_ids, count)
        return self._key(self._before(count), token_ids[count * self.block_size : end])

    def _before(self, page: int) -> bytes:
        return self._chain[page - 1] if page else self._origin

    @staticmethod
    def _key(before: bytes, token_ids: Sequence[int]) -> bytes:
        return blake2b(before + array(TOKEN_CODE, token_ids).tobytes(), digest_size=KEY_BYTES).digest()


class PrefixIndex:
    """Pages of a pool by the keys of what they hold. It also orders the pages that nobody holds by their last use.

    A page may have several keys: as it fills up, the key of its front stays valid. The first page of a key stays; a
    later page with the same content is not indexed.
    """

    def __init__(self) -> None:
        self.num_evictions = 0
        self._page_of: dict[bytes, int] = {}
        self._keys_of: dict[int, list[bytes]] = {}
        self._idle: dict[int, None] = {}  # pages that nobody holds, least recently used first

    @property
    def num_idle(self) -> int:
        """Indexed pages that nobody holds."""
        return len(self._idle)

    def __contains__(self, page: int) -> bool:
        return page in self._keys_of

    def find(self, key: bytes) -> int | None:
        """The page with this key, or None."""
        return self._page_of.get(key)

    def add(self, key: bytes, page: int) -> None:
        """Index a page that somebody holds. Does nothing if the key has a page already."""
        assert page not in self._idle
        if key not in self._page_of:
            self._page_of[key] = page
            self._keys_of.setdefault(page, []).append(key)

    def rest(self, page: int) -> None:
        """Nobody holds an indexed page any more; it is the one used last."""
        assert page in self._keys_of and page not in self._idle
        self._idle[page] = None

    def wake(self, page: int) -> None:
        """Somebody holds this page again."""
        del self._idle[page]

    def evict(self) -> int:
        """Forget the page that was used least recently, of those that nobody holds, and return it."""
        page = next(iter(self._idle))
        del self._idle[page]
        for key in self._keys_of.pop(page):
            del self._page_of[key]
        self.num_evictions += 1
        return page

    def clear(self) -> list[int]:
        """Forget everything. Returns the pages that nobody holds."""
        idle = list(self._idle)
        for pages in (self._page_of, self._keys_of, self._idle):
            pages.clear()
        return idle
