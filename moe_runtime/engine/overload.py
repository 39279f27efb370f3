"""Fewer experts per token for new requests while the queue is long (`overload_routing`). No torch."""

from __future__ import annotations

from dataclasses import replace

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.expert_policy import ExpertPolicies
from moe_runtime.engine.request import Request
from moe_runtime.types.expert_policy import ExpertPolicy


class OverloadRouting:
    """Chooses the expert policy of requests when a rank first admits them. A request keeps its policy.

    Args:
        name: the policy as the operator wrote it.
        policy: the same, resolved for the model.
        queue: (high, low). Requests get the policy from when more than `high` wait until less than `low` do.

    Attributes:
        is_active: whether requests that are admitted now get the policy.
        num_requests: how many have got it.
    """

    def __init__(self, name: str, policy: ExpertPolicy, queue: tuple[int, int]) -> None:
        self._name = name
        self._policy = policy
        self._high, self._low = queue
        self.is_active = False
        self.num_requests = 0

    def note(self, num_waiting: int) -> None:
        """So many requests wait that no rank has room for."""
        self.is_active = num_waiting > self._high or (self.is_active and num_waiting >= self._low)

    def choose(self, request: Request) -> None:
        """Give a request the policy before it is first admitted, if it takes the server's default."""
        if self.is_active and request.takes_default_routing and request.scheduled_at is None:
            request.params = replace(request.params, routing=self._policy)
            request.takes_default_routing = False
            if request.page_keys is not None:
                request.page_keys = request.page_keys.also(repr(self._policy))
            request.overload_routing = self._name
            self.num_requests += 1


def overload_routing(config: EngineConfig, policies: ExpertPolicies) -> OverloadRouting | None:
    """What the options ask for; None if they do not.

    Raises:
        ValueError: the policy cannot be applied to this model, or drops nothing.
    """
    asked = config.overload_routing
    if asked is None:
        return None
    try:
        policy = policies.resolve(asked)
    except ValueError as error:
        raise ValueError(f"overload_{error}") from error
    if policy is None:
        raise ValueError(f"overload_routing: {asked!r} is not allowed; it must use fewer experts than the model")
    full_batch = config.max_num_seqs * config.ep_size
    high, low = config.overload_queue or (full_batch, full_batch // 4)
    return OverloadRouting(asked if isinstance(asked, str) else _text(policy), policy, (high, low))


def _text(policy: ExpertPolicy) -> str:
    return ",".join(f"{name}={value}" for name, value in vars(policy).items() if value is not None)
