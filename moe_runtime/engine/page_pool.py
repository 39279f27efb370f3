"""The pages of one rank's KV cache. This is the front's bookkeeping; the pages themselves lie on the rank."""

from __future__ import annotations


class BlockPool:
    """Hands out page numbers `0 .. num_blocks - 1`, each to one holder at a time."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\1" * num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; the caller has looked at `num_free`."""
        assert count <= len(self._free), f"{count} pages asked for, {len(self._free)} are free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_free[block] = False
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give pages back."""
        for block in reversed(blocks):
            assert not self._is_free[block], f"page {block} is freed twice"
            self._is_free[block] = True
            self._free.append(block)
