from __future__ import annotations

import pytest

from moe_runtime.engine.page_pool import Hit
from moe_runtime.engine.rank_choice import Offer, best_offer


def offer(rank: int = 0, hit: int = 0, coming: int = 0, load: int = 0, budget: bool = True, spare: int = 9) -> Offer:
    """For a request of 100 tokens, with pages of 8."""
    return Offer(
        rank=rank,
        hit=Hit(hit, []),
        num_coming=coming,
        num_tokens=100,
        load=load,
        needed=[1],
        spare=spare,
        has_budget=budget,
        block_size=8,
    )


@pytest.mark.parametrize(
    ("hit", "coming", "waits"),
    [(0, 0, False), (0, 50, False), (0, 51, True), (96, 3, False), (80, 8, False), (80, 11, True), (88, 8, True)],
)
def test_a_request_waits_for_most_of_what_it_misses_and_for_a_page_at_least(hit, coming, waits):
    assert offer(hit=hit, coming=coming).waits == waits
    assert offer(hit=hit, coming=coming, load=7).cost == 7 + 100 - hit - coming * waits


def test_the_fewest_tokens_then_the_most_pages_then_the_first_rank():
    assert best_offer([]) is None
    assert best_offer([offer(budget=False, hit=90)]) is None
    cases = [
        ([offer(0, load=10), offer(1, load=9)], 1),
        ([offer(0, load=10, hit=8), offer(1)], 1),
        ([offer(0, load=10, hit=16), offer(1)], 0),
        ([offer(0, load=10, hit=16, budget=False), offer(1)], 1),
        ([offer(0, load=10, coming=80, budget=False), offer(1)], 0),
        ([offer(0, load=100, coming=80), offer(1)], 1),
        ([offer(0), offer(1, spare=10)], 1),
        ([offer(1), offer(0)], 0),
    ]
    for offers, expected in cases:
        best = best_offer(offers)
        assert best is not None and best.rank == expected, (offers, expected)
