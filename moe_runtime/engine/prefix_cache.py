"""Which tokens of a request a rank need not compute, because their keys and values are in its pages. No torch.

Pages are indexed once the step that writes them was submitted and their tokens are known. A later step may share them,
for a rank runs its plans in order, also if their request has ended meanwhile. Generated tokens are indexed as well, so
the next turn of a chat and a preempted request find them.
"""

from __future__ import annotations

from collections import Counter

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.engine.page_pool import Hit, RankPages
from moe_runtime.engine.prefix_index import PageKeys
from moe_runtime.engine.request import Request
from moe_runtime.engine.stats import PrefixCounts
from moe_runtime.types.expert_policy import ExpertPolicy


def why_off(config: EngineConfig) -> str | None:
    """Why an engine caches no prefixes; None if it does."""
    if not config.enable_prefix_caching:
        return "enable_prefix_caching is false"
    if config.record_trace is not None:
        return "record_trace needs the experts of every token"
    if config.balance_epsilon is not None:
        return "with balance_epsilon, tokens depend on the batch"
    if config.limits is not None and config.limits.changes_experts:
        return f"with overflow {config.overflow!r}, tokens depend on the batch"
    return None


class KeyMaker:
    """Makes the keys of requests' pages.

    Args:
        block_size: tokens per page.
        with_length: keys and values depend on the length of the prompt, as with "dynamic" rope.
    """

    def __init__(self, block_size: int, with_length: bool) -> None:
        self._block_size = block_size
        self._with_length = with_length
        self._num_resets = 0

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig) -> KeyMaker | None:
        """The keys of an engine; None if it caches no prefixes."""
        return None if why_off(config) else cls(config.block_size, model.rope.kind == "dynamic")

    def keys(self, num_prompt_tokens: int, policy: ExpertPolicy | None, salt: str | None) -> PageKeys:
        """The keys of a request. Fewer experts change hidden states, and so keys and values."""
        length = num_prompt_tokens if self._with_length else None
        return PageKeys(repr((policy, salt, length, self._num_resets)), self._block_size)

    def reset(self) -> None:
        """Later requests find no page of earlier ones."""
        self._num_resets += 1


class PrefixCache:
    """The prefix cache of one rank.

    Args:
        pages: of the rank.
    """

    def __init__(self, pages: RankPages) -> None:
        self._pages = pages
        self._coming: Counter[bytes] = Counter()  # keys of pages that running prompts are to fill
        self._num_queries = 0
        self._num_hits = 0

    def counts(self) -> PrefixCounts:
        """Counts since the start."""
        return PrefixCounts(
            self._num_queries, self._num_hits, sum(pool.index.num_evictions for pool in self._pages.pools)
        )

    def find(self, request: Request) -> Hit:
        """The beginning of a waiting request that is in pages. It never has the last token, whose logits are needed."""
        keys = request.page_keys
        if keys is None or not request.may_reuse:
            return self._pages.miss()
        last = len(request.token_ids) - 1
        full, tail = keys.full(request.token_ids, last // keys.block_size), keys.tail(request.token_ids, last)
        return self._pages.find(full, last, tail)

    def num_coming(self, request: Request, hit: Hit) -> int:
        """Tokens of a waiting request beyond its hit that running prompts are to compute."""
        keys = request.page_keys
        if keys is None or not request.may_reuse or not self._coming:
            return 0
        last, size = len(request.token_ids) - 1, keys.block_size
        full = keys.full(request.token_ids, last // size)
        first = hit.num_tokens // size
        reach = next((number for number, key in enumerate(full[first:], first) if key not in self._coming), len(full))
        is_whole = reach == len(full) and keys.tail(request.token_ids, last) in self._coming
        return max(0, (last if is_whole else reach * size) - hit.num_tokens)

    def start(self, request: Request, hit: Hit) -> None:
        """A rank takes in a request with its hit."""
        keys = request.page_keys
        if keys is None:
            return
        if request.may_reuse:
            self._num_queries += len(request.token_ids)
            self._num_hits += hit.num_tokens
        request.num_indexed = hit.num_tokens // keys.block_size
        self._coming.update(self._keys_to_come(request, keys))

    def update(self, request: Request) -> None:
        """Index the pages of a running request that steps planned so far fill. Call it before the next is planned."""
        keys = request.page_keys
        if keys is None:
            return
        num_ready = min(request.num_planned, len(request.token_ids))
        count = num_ready // keys.block_size
        if count > request.num_indexed:
            first = request.num_indexed
            new = keys.full(request.token_ids, count)[first:]
            self._forget_coming(new[: max(0, request.num_prefill_tokens // keys.block_size - first)])
            self._pages.add_to_index(request.pages, first, new)
            request.num_indexed = count
        last = request.num_prefill_tokens - 1
        if not request.has_tail and num_ready > last:
            if (tail := keys.tail(request.token_ids, last)) is not None:
                self._forget_coming([tail])
                self._pages.add_to_index(request.pages, last // keys.block_size, [tail])
            request.has_tail = True

    def end(self, request: Request) -> None:
        """A running request ends or is preempted; it still has its pages."""
        keys = request.page_keys
        if keys is None:
            return
        self.update(request)
        self._forget_coming(self._keys_to_come(request, keys))
        request.num_indexed = 0
        request.has_tail = False

    @staticmethod
    def _keys_to_come(request: Request, keys: PageKeys) -> list[bytes]:
        """Keys of a running request's pages that its prompt fills and that are not indexed yet."""
        count = request.num_prefill_tokens // keys.block_size
        tail = None if request.has_tail else keys.tail(request.token_ids, request.num_prefill_tokens - 1)
        return keys.full(request.token_ids, count)[request.num_indexed :] + ([] if tail is None else [tail])

    def _forget_coming(self, keys: list[bytes]) -> None:
        for key in keys:
            self._coming[key] -= 1
            if not self._coming[key]:
                del self._coming[key]
