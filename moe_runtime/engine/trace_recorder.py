"""Collects the expert choices of all steps and writes them to a file when the engine ends. No torch.

Shape suffixes: T tokens, L sparse layers, K experts per token.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.trace import MAX_EXPERTS, RoutingTrace
from moe_runtime.config.checks import check_output

if TYPE_CHECKING:
    from moe_runtime.config.model import ModelConfig
    from moe_runtime.wire.messages import RankResult, RoutedExperts

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 30  # of expert choices kept in memory; later steps are left out


class TraceRecorder:
    """Keeps expert choices in memory, up to `max_bytes`, until `save`.

    Args:
        path: the `.npz` file to write; its folder must exist.
        model, name: the checkpoint, and its name in the file.

    Raises:
        ValueError: the file cannot be written there, or the model has too many experts.
    """

    def __init__(self, path: str, model: ModelConfig, name: str, max_bytes: int = MAX_BYTES) -> None:
        self._path = Path(path)
        check_output("record_trace", path, (".npz",))
        if model.moe.num_experts > MAX_EXPERTS:
            raise ValueError(
                f"record_trace: is not allowed for {model.moe.num_experts} experts; there must be at most {MAX_EXPERTS}"
            )
        self._model, self._name = model, name
        self._room = max_bytes
        self._is_full = self._saved = False
        self._parts: list[tuple[npt.NDArray[np.uint16], int, int, bool]] = []

    def add(self, results: list[RankResult]) -> None:
        """Add what the ranks report for one step."""
        for result in results:
            for routed in result.routed_experts:
                self._room -= len(routed.experts)
                if self._room < 0:
                    if not self._is_full:
                        logger.warning(
                            "record_trace: the trace is full at step %d; later steps are not recorded", result.step
                        )
                    self._is_full = True
                    return
                self._parts.append((read_routed(routed, self._model), result.step, result.rank, routed.is_decode))

    def save(self) -> None:
        """Write the file. A second call does nothing."""
        if self._saved:
            return
        self._saved = True
        shape = (0, len(self._model.moe_layers), self._model.moe.top_k)
        lengths = [len(part[0]) for part in self._parts]
        trace = RoutingTrace(
            experts=np.concatenate([np.empty(shape, np.uint16), *(part[0] for part in self._parts)]),
            step=np.repeat(np.array([part[1] for part in self._parts], np.int32), lengths),
            rank=np.repeat(np.array([part[2] for part in self._parts], np.uint16), lengths),
            is_decode=np.repeat(np.array([part[3] for part in self._parts], np.bool_), lengths),
            num_experts=self._model.moe.num_experts,
            layer_ids=self._model.moe_layers,
            model=self._name,
            top_k=self._model.moe.top_k,
        )
        try:
            trace.save(self._path)
        except OSError as error:
            logger.error("record_trace: %s cannot be written: %s", self._path, error.strerror)
        else:
            logger.info("record_trace: %d tokens of %d steps in %s", trace.num_tokens, trace.num_steps, self._path)


def read_routed(routed: RoutedExperts, model: ModelConfig) -> npt.NDArray[np.uint16]:
    """The experts of a chunk, uint16 [T, L, K]."""
    return np.frombuffer(routed.experts, np.uint16).reshape(-1, len(model.moe_layers), model.moe.top_k)


def compact(parts: list[npt.NDArray[np.uint16]], model: ModelConfig) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Join the parts into one array [T, L, K], uint8 or uint16: the smaller type that holds all experts. Its largest
    value means that there is no expert."""
    shape = (0, len(model.moe_layers), model.moe.top_k)
    whole = np.concatenate([np.empty(shape, np.uint16), *parts])
    return whole.astype(np.uint8) if model.moe.num_experts < 256 else whole  # 0xFFFF becomes 0xFF
