"""The experts that a request's tokens used, for requests that ask for them. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.config.model import ModelConfig
from moe_runtime.engine.request import Request
from moe_runtime.wire.messages import RoutedExperts

if TYPE_CHECKING:
    import numpy as np


def add_routed(request: Request, found: RoutedExperts, model: ModelConfig) -> None:
    """Keep the experts of a chunk, except for positions whose experts are already known."""
    from moe_runtime.engine.trace_recorder import read_routed  # numpy: importing moe_runtime stays light

    experts_TLK = read_routed(found, model)
    num_known = request.num_routed - found.start  # a preempted sequence is prefilled again
    assert num_known >= 0
    if num_known < len(experts_TLK):
        request.routed_experts.append(experts_TLK[num_known:])


def routed_output(request: Request, model: ModelConfig) -> np.ndarray | None:
    """The value of `CompletionOutput.routed_experts`; None if the request did not ask for it."""
    if not request.params.return_routed_experts:
        return None
    from moe_runtime.engine.trace_recorder import compact

    return compact(request.routed_experts, model)
