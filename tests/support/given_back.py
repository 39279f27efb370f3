"""Pages behind a window, which a sequence has given back and another one may hold."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moe_runtime.memory.page_group import PageGroup


def spoil(
    window: int | None,
    num_query: Sequence[int],
    context_len: Sequence[int],
    blocks: Sequence[Sequence[int]],
    *caches: Tensor,
) -> int:
    """Fill the pages behind the sequences' windows with NaN; returns how many there are."""
    group, count = PageGroup(window, caches[0].shape[1], 1), 0
    for queries, context, pages in zip(num_query, context_len, blocks, strict=True):
        behind = list(pages[: group.first_read(context - queries)])
        for cache in caches:
            cache[behind] = float("nan")
        count += len(behind)
    return count
