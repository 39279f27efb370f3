"""Chooses the rank of a waiting request by what its prefix cache has and by the rank's load. No torch.

Of the ranks that can take the request, it goes to the one where the fewest tokens remain to be computed: those of the
rank's own sequences, and those of the request that are not in pages there. If a running prompt there is to compute most
of them, and at least a page, the request waits for its pages. It waits no longer than that prompt's prefill, and later
requests that share nothing with it may overtake it meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_runtime.engine.page_pool import Hit


@dataclass(frozen=True)
class Offer:
    """A rank with a seat and pages for a request.

    Attributes:
        hit: what is in pages there.
        num_coming: tokens after the hit that running prompts there are to compute.
        num_tokens: of the request.
        load: tokens that the rank's sequences still have to run, and those planned in this step.
        needed: pages of each group that the request takes at most for the tokens it has.
        spare: free pages of the group with the fewest.
        has_budget: whether the step may take tokens of further prompts there.
        block_size: tokens per page.
    """

    rank: int
    hit: Hit
    num_coming: int
    num_tokens: int
    load: int
    needed: list[int]
    spare: int
    has_budget: bool
    block_size: int

    @property
    def waits(self) -> bool:
        """Whether the request is better off to wait for pages of a running prompt."""
        num_missing = self.num_tokens - self.hit.num_tokens
        return self.num_coming >= self.block_size and 2 * self.num_coming > num_missing

    @property
    def cost(self) -> int:
        """Tokens that remain to be computed on the rank, if it takes the request."""
        num_found = self.hit.num_tokens + (self.num_coming if self.waits else 0)
        return self.load + self.num_tokens - num_found


def best_offer(offers: Iterable[Offer]) -> Offer | None:
    """The rank that a request should go to, or should wait for; None if no rank can take it."""
    possible = [offer for offer in offers if offer.has_budget or offer.waits]
    return min(possible, key=lambda offer: (offer.cost, -offer.spare, offer.rank), default=None)
