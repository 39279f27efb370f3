from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_runtime.engine.page_pool import PagePool


class PagePools(RuleBasedStateMachine):
    """A pool beside a slow model: the holders of every page, what the index knows of it, and when it was used last."""

    @initialize(num_pages=st.integers(1, 8))
    def begin(self, num_pages):
        self.pool = PagePool(num_pages)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.last_use: dict[int, int] = {}
        self.now = self.num_forgotten = 0

    def num_holders(self, page):
        return sum(page in pages for pages in self.held)

    def idle(self):
        """Pages that nobody holds and whose content is known, least recently used first."""
        return sorted((p for p in self.content if not self.num_holders(p)), key=self.last_use.__getitem__)

    @rule(count=st.integers(0, 8))
    def allocate(self, count):
        if count > self.pool.num_free:
            return
        idle = self.idle()
        num_blank = self.pool.num_free - len(idle)
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count and not any(map(self.num_holders, pages))
        forgotten = idle[: max(0, count - num_blank)]
        assert [page for page in pages if page in self.content] == forgotten, "blank pages first, then the oldest"
        self.num_forgotten += len(forgotten)
        for page in forgotten:
            del self.content[page]
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def index(self, data):
        pages = data.draw(st.sampled_from(self.held))
        if pages:
            page, key = data.draw(st.sampled_from(pages)), bytes([data.draw(st.integers(0, 9))])
            known = key in self.content.values()
            if not known and page not in self.content:
                self.content[page] = key
                self.pool.index.add(key, page)
            elif known:
                self.pool.index.add(key, page)  # changes nothing

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def share(self, data):
        pages = data.draw(st.lists(st.sampled_from(sorted(self.content)), unique=True))
        found = [self.pool.index.find(self.content[page]) for page in pages]
        assert found == pages
        self.pool.share(pages)
        self.held.append(list(pages))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert self.pool.num_freed(pages) == sum(not self.num_holders(page) for page in pages)
        self.pool.free(pages)
        for page in reversed(pages):
            self.now += 1
            if not self.num_holders(page):
                self.last_use[page] = self.now

    @rule()
    def forget(self):
        self.pool.forget()
        self.content.clear()

    @invariant()
    def every_page_is_held_or_free(self):
        holders = [self.num_holders(page) for page in range(self.pool.num_pages)]
        assert self.pool.num_used == self.pool.num_held(range(self.pool.num_pages)) == sum(map(bool, holders))
        assert self.pool.num_free == holders.count(0)
        assert self.pool.index.num_idle == len(self.idle())
        assert self.pool.index.num_evictions == self.num_forgotten
        assert all(self.pool.index.find(key) == page for page, key in self.content.items())


PagePools.TestCase.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
test_page_pools = PagePools.TestCase


def test_misuse_is_ours_and_asserted():
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="3 pages asked for, 2 are free"):
        pool.allocate(3)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages)
