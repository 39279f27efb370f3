from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.engine.page_pool import PagePool


@given(st.integers(1, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_a_page_has_one_holder(num_pages, actions):
    pool = PagePool(num_pages)
    held: list[list[int]] = []
    for is_allocation, number in actions:
        if is_allocation and number <= pool.num_free:
            held.append(pool.allocate(number))
        elif not is_allocation and held:
            pool.free(held.pop(number % len(held)))
        pages = [page for pages in held for page in pages]
        assert len(set(pages)) == len(pages)
        assert set(pages) <= set(range(num_pages))
        assert pool.num_free == num_pages - len(pages)


def test_misuse_is_ours_and_asserted():
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="3 pages asked for, 2 are free"):
        pool.allocate(3)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages)
