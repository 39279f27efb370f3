"""Work beside the main stream of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The second stream of a GPU, one for all layers, so that they share its memory; None for a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class SideStream:
    """Runs a function in parallel with later work, on a second stream of a GPU; on CPUs it runs immediately.

    The side stream waits for all earlier work. Taking the result waits for the side stream. The function's inputs must
    live until then. No other synchronisation of memory is needed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = side_stream(device)

    def start(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        """Start `function(x)`; the returned callable gives its result, in the order of the main stream."""
        side = self._stream
        if side is None:
            result = function(x)
            return lambda: result
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            result = function(x)

        def join() -> Tensor:
            torch.cuda.current_stream(self._device).wait_stream(side)
            return result

        return join
