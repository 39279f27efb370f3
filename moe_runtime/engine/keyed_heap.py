"""A heap whose keys change and whose items leave. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Any, Generic, TypeVar

Item = TypeVar("Item", int, str)

SPARE = 16  # old entries that are kept at least


class KeyedHeap(Generic[Item]):
    """Items in order of their keys; among equal keys, in order of the items.

    An item that leaves or gets another key leaves its old entry in the heap. Such entries are skipped when they come to
    the top, and swept once they are most of the heap. So each operation takes O(log n) on average.
    """

    def __init__(self) -> None:
        self._keys: dict[Item, Any] = {}
        self._heap: list[tuple[Any, Item]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, item: Item) -> bool:
        return item in self._keys

    def __iter__(self) -> Iterator[Item]:
        """All items, in no order."""
        return iter(self._keys)

    def key(self, item: Item) -> Any:
        """The key of an item that is here."""
        return self._keys[item]

    def set(self, item: Item, key: Any) -> None:
        """Add an item, or give it another key."""
        self._keys[item] = key
        heappush(self._heap, (key, item))
        self._sweep()

    def remove(self, item: Item) -> None:
        """Remove an item that is here."""
        del self._keys[item]
        self._sweep()

    def first(self) -> Item | None:
        """The item with the least key; None if there is none."""
        while self._heap:
            key, item = self._heap[0]
            if self._keys.get(item) == key:
                return item
            heappop(self._heap)
        return None

    def _sweep(self) -> None:
        if len(self._heap) > 2 * len(self._keys) + SPARE:
            self._heap = sorted((key, item) for item, key in self._keys.items())
