from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.engine.prefix_index import PageKeys, PrefixIndex

TOKENS = st.lists(st.integers(0, 2) | st.integers(0, 2**32 - 1), max_size=20)
ORIGINS = st.sampled_from(["", "a", "ab"])


def all_keys(origin: str, token_ids: list[int]) -> list[tuple[object, bytes]]:
    """What each page's keys and values depend on, and its key."""
    keys = PageKeys(origin, 4)
    found: list[tuple[object, bytes]] = []
    for number, key in enumerate(keys.full(token_ids, len(token_ids) // 4), 1):
        found.append(((origin, token_ids[: 4 * number]), key))
    for end in range(len(token_ids) + 1):
        if end % 4:
            found.append(((origin, token_ids[:end]), keys.tail(token_ids, end)))
    return found


@given(ORIGINS, TOKENS, ORIGINS, TOKENS, st.integers(0, 20))
def test_keys_are_equal_where_all_that_a_page_depends_on_is(origin, token_ids, other, others, num_shared):
    others = token_ids[:num_shared] + others
    for ours, key in all_keys(origin, token_ids):
        for theirs, their_key in all_keys(other, others):
            assert (key == their_key) == (ours == theirs)


@given(TOKENS, st.lists(st.integers(0, 20)))
def test_keys_of_a_growing_sequence_are_those_of_the_whole(token_ids, ends):
    whole = PageKeys("", 4).full(token_ids, len(token_ids) // 4)
    keys, so_far = PageKeys("", 4), []
    for end in sorted(min(end, len(token_ids)) for end in ends):
        so_far += token_ids[len(so_far) : end]
        assert keys.full(so_far, end // 4) == whole[: end // 4]
        if end % 4:
            assert keys.tail(so_far, end) == PageKeys("", 4).tail(token_ids, end)


def test_the_first_page_of_a_key_stays():
    index = PrefixIndex()
    index.add(b"a", 3)
    index.add(b"a", 4)
    index.add(b"ab", 3)
    assert (index.find(b"a"), index.find(b"ab"), index.find(b"b")) == (3, 3, None)
    assert 3 in index and 4 not in index
    index.rest(3)
    assert index.evict() == 3
    assert (index.find(b"a"), index.find(b"ab"), index.num_evictions, index.num_idle) == (None, None, 1, 0)


def test_pages_are_forgotten_in_the_order_of_their_last_use():
    index = PrefixIndex()
    for page in range(4):
        index.add(b"%d" % page, page)
    for page in (2, 0, 1, 3):
        index.rest(page)
    index.wake(2)
    index.rest(2)
    assert [index.evict() for _ in range(4)] == [0, 1, 3, 2]


def test_what_else_keys_depend_on_changes_all_of_them():
    tokens, keys = list(range(9)), PageKeys("a", 4)
    others = [keys.also("x"), keys.also("y"), keys.also("x").also("y"), PageKeys("x", 4).also("a")]
    found = [key for each in (keys, *others) for key in [*each.full(tokens, 2), each.tail(tokens, 9)]]
    assert len(set(found)) == 15
    assert PageKeys("a", 4).also("x").full(tokens, 2) == others[0].full(tokens, 2)
