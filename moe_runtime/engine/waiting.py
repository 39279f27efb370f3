"""The requests that wait for a rank, and which of them comes next. No torch.

1. Lower `priority` comes first.
2. Among requests of one priority, users take turns: next is the user for whom the ranks have computed the fewest tokens
   while requests of this priority waited. A user who begins to wait starts level with the least of those who wait, so
   that nobody saves up turns. (The virtual token counter of "Fairness in Serving Large Language Models",
   arXiv 2401.00588, which is start-time fair queueing with costs that become known as they arise.)
3. Requests of one user go in order of arrival.
4. Every `OLDEST_EVERY`-th admission takes the request that arrived first, whatever its priority and user. So a request
   that k older ones wait with is admitted after at most `OLDEST_EVERY * (k + 1)` admissions: nothing starves.

Each operation takes O(log n) on average.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import count

from moe_runtime.engine.keyed_heap import KeyedHeap
from moe_runtime.engine.request import Request

OLDEST_EVERY = 8
MAX_IDLE_USERS = 4096  # whose tokens a level remembers while they do not wait


class Waiting:
    """Requests that wait. `next` is one of them; `admit` takes it out.

    Iterating gives them in order of arrival.
    """

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._by_arrival: KeyedHeap[int] = KeyedHeap()
        self._levels: dict[int, _Level] = {}
        self._priorities: KeyedHeap[int] = KeyedHeap()
        self._num_admitted = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._requests.values(), key=lambda request: request.seq_id))

    def add(self, request: Request) -> None:
        """Add a new request, or put one back that was preempted."""
        self._insert(request, is_new=True)

    def _insert(self, request: Request, is_new: bool) -> None:
        assert request.seq_id not in self._requests
        self._requests[request.seq_id] = request
        self._by_arrival.set(request.seq_id, request.seq_id)
        priority = request.params.priority
        level = self._levels.setdefault(priority, _Level())
        if not level:
            self._priorities.set(priority, priority)
        level.add(request.user, request.seq_id, level.least() if is_new else 0)

    def remove(self, request: Request) -> None:
        """Remove a request that is here."""
        self.set_aside(request)
        priority = request.params.priority
        if not self._levels[priority]:
            del self._levels[priority]

    def next(self) -> Request | None:
        """The request to admit next; None if none waits."""
        if not self._requests:
            return None
        if self._num_admitted % OLDEST_EVERY == OLDEST_EVERY - 1:
            seq_id = self._by_arrival.first()
        else:
            priority = self._priorities.first()
            assert priority is not None
            seq_id = self._levels[priority].first()
        assert seq_id is not None
        return self._requests[seq_id]

    def admit(self, request: Request) -> None:
        """Remove the request that `next` returned, as a rank runs it from now on."""
        self.remove(request)
        self._num_admitted += 1

    def set_aside(self, request: Request) -> None:
        """Take a request out for a while, so that others come next. `put_back` ends it."""
        del self._requests[request.seq_id]
        self._by_arrival.remove(request.seq_id)
        priority = request.params.priority
        self._levels[priority].remove(request.user, request.seq_id)
        if not self._levels[priority]:
            self._priorities.remove(priority)

    def put_back(self, request: Request) -> None:
        """Undo `set_aside`. The request's user loses no turn."""
        self._insert(request, is_new=False)

    def charge(self, request: Request, num_tokens: int) -> None:
        """A rank computes tokens of a request. They count for its user's turns if others of its priority wait."""
        level = self._levels.get(request.params.priority)
        if level is not None:
            level.charge(request.user, num_tokens)


class _Level:
    """The requests of one priority, by user. A user's key is its tokens, then when it began to wait."""

    def __init__(self) -> None:
        self._users: KeyedHeap[str] = KeyedHeap()
        self._seq_ids: dict[str, KeyedHeap[int]] = {}
        self._idle: OrderedDict[str, int] = OrderedDict()  # tokens of users of whom nothing waits here
        self._numbers = count()

    def __bool__(self) -> bool:
        return bool(self._seq_ids)

    def add(self, user: str, seq_id: int, least: int) -> None:
        """A user who does not wait yet starts with `least` tokens, or more if it has had more."""
        if user not in self._seq_ids:
            self._users.set(user, (max(least, self._idle.pop(user, 0)), next(self._numbers)))
            self._seq_ids[user] = KeyedHeap()
        self._seq_ids[user].set(seq_id, seq_id)

    def remove(self, user: str, seq_id: int) -> None:
        self._seq_ids[user].remove(seq_id)
        if not self._seq_ids[user]:
            del self._seq_ids[user]
            tokens, _ = self._users.key(user)
            self._users.remove(user)
            self._remember(user, tokens)

    def first(self) -> int | None:
        user = self._users.first()
        assert user is not None
        return self._seq_ids[user].first()

    def charge(self, user: str, num_tokens: int) -> None:
        if user in self._users:
            tokens, number = self._users.key(user)
            self._users.set(user, (tokens + num_tokens, number))
        else:
            self._remember(user, max(self.least(), self._idle.get(user, 0)) + num_tokens)

    def least(self) -> int:
        """The tokens of the user whose turn is next; 0 if none waits."""
        user = self._users.first()
        if user is None:
            return 0
        tokens: int = self._users.key(user)[0]
        return tokens

    def _remember(self, user: str, tokens: int) -> None:
        self._idle[user] = tokens
        self._idle.move_to_end(user)
        if len(self._idle) > MAX_IDLE_USERS:
            self._idle.popitem(last=False)
