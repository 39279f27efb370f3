"""Checks that all engines hold the same weights: same log-probabilities for the same tokens, within bfloat16.

At every position, an engine reports some tokens (the prompt's own and its best ones). The reference has the
log-probabilities of all tokens, in float32. The divergence of the two distributions treats all unreported tokens as
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

TOP = 20  # best tokens per position; what all engines can give
# With transformers, bfloat16 gives about a tenth of this limit; other weights give hundreds of times as much.
MAX_MEAN_KL = 0.005
MAX_QUANTIZED_KL = {"int8": 0.02, "int4": 0.5}


@dataclass(frozen=True)
class Agreement:
    """Agreement of an engine with the reference: divergence (nats per position), reported log-probabilities."""

    mean_kl: float
    max_kl: float
    rms_logprob: float
    limit: float

    @property
    def agrees(self) -> bool:
        return self.mean_kl <= self.limit


def compare(reference_PTV: np.ndarray, answers: list[Any], limit: float = MAX_MEAN_KL) -> Agreement:
    """Compare an engine's answer to `logprobs` with the reference `[prompts, positions, V]`."""
    divergences, squares = [], []
    for reference_TV, positions in zip(reference_PTV, answers, strict=True):
        for reference_V, (ids, logprobs) in zip(reference_TV, positions, strict=True):
            named = dict(zip(ids, logprobs, strict=True))
            p_log = reference_V[list(named)].astype(np.float64)
            q_log = np.array(list(named.values()))
            squares.append(np.mean((p_log - q_log) ** 2))
            p_log, q_log = (np.append(log, _log_of_rest(log)) for log in (p_log, q_log))
            divergences.append(float(np.sum(np.exp(p_log) * (p_log - q_log))))
    means = float(np.mean(divergences)), float(np.max(divergences)), float(np.sqrt(np.mean(squares)))
    return Agreement(*means, limit)


def _log_of_rest(logprobs: np.ndarray) -> float:
    return float(np.log(max(1 - np.exp(logprobs).sum(), 1e-9)))
