"""Which experts a step's tokens use: from a recorded trace, or from measured or assumed loads.

Shape suffixes: T tokens, L layers, E logical experts, K experts per token, W ranks (or groups of them).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.checks import check_load
from moe_runtime.balancer.synthetic import zipf_load
from moe_runtime.balancer.trace import UNUSED, RoutingTrace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_LAYERS = 16  # layers of a model, spread evenly, that represent all
ASSUMED_LAYERS = 4  # few are enough: layers with an assumed load differ only by chance
SPREAD_TOKENS = 256


class Routing(Protocol):
    """What the prediction needs; the layers are those that represent all."""

    @property
    def plan_load(self) -> Floats:
        """[L, E]: the loads that placements are planned for."""

    def counts(self, layer: int, num_tokens: int, draw: int) -> Ints:
        """int64 [E]: rows of each expert in a step with `num_tokens` tokens; `draw` numbers the steps."""

    def hits(self, layer: int, share_EW: Floats) -> Floats:
        """[W]: the probability that a token sends a row to each group of ranks; groups have these shares of experts."""


class LoadRouting:
    """Every token uses each expert at random, with the expert's own probability: about K experts per token.

    An expert with share p of the load is among a token's K with probability 1 - exp(-p * s). The value s is such that
    these probabilities add up to K. This is the limit of K draws without replacement with many experts (Rosen 1972,
    successive sampling).

    Args:
        load_LE: tokens per layer and expert, in any unit. With `exact`, a layer's row is proportional to these
            probabilities: it has the counts of a model in which every token used K experts.
        top_k: K.
        seed: of the random draws.
    """

    def __init__(self, load_LE: npt.ArrayLike, top_k: int, *, exact: bool = False, seed: int = 0) -> None:
        load = check_load("load", load_LE, ("layers", "experts"))
        num_experts = load.shape[1]
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k: {top_k} is not allowed; it must be from 1 to the number of experts, {num_experts}"
            )
        chosen = load[chosen_layers(len(load))]
        make = _scaled if exact else _inclusion
        self._probability_LE = np.stack([make(load_E, top_k) for load_E in chosen])
        self._seed = seed

    @classmethod
    def assume(cls, what: str, num_experts: int, top_k: int, seed: int = 0) -> LoadRouting:
        """Loads by name: "uniform", or "zipf:X" (the n-th hottest expert has 1 / n ** X of the hottest's load).

        Raises:
            ValueError: neither.
        """
        kind, _, exponent = what.partition(":")
        try:
            power = 0.0 if what == "uniform" else float(exponent)
        except ValueError:
            kind = ""
        if (what != "uniform" and kind != "zipf") or not 0 <= power <= 10:
            raise ValueError(f'assume: {what!r} is not allowed; it must be "uniform" or "zipf:X" with X from 0 to 10')
        rng = np.random.default_rng(seed)
        load_LE = np.stack([zipf_load(rng, num_experts, power) for _ in range(ASSUMED_LAYERS)])
        return cls(load_LE, top_k, seed=seed)

    @property
    def plan_load(self) -> Floats:
        return self._probability_LE

    def counts(self, layer: int, num_tokens: int, draw: int) -> Ints:
        rng = np.random.default_rng((self._seed, layer, num_tokens, draw))
        count_E: Ints = rng.binomial(num_tokens, self._probability_LE[layer]).astype(np.int64)
        return count_E

    def hits(self, layer: int, share_EW: Floats) -> Floats:
        found: Floats = 1 - np.prod(1 - self._probability_LE[layer][:, None] * share_EW, axis=0)
        return found


class TraceRouting:
    """Recorded tokens of one phase: placements are planned for the first half, and steps use the second.

    A step takes consecutive tokens of the second half. Its start differs per draw, spread over the half. At the end of
    the half it continues at the beginning of the half.

    Args:
        trace: the recorded trace.
        phase: "prefill" or "decode".

    Raises:
        ValueError: it has fewer than two tokens of the phase.
    """

    def __init__(self, trace: RoutingTrace, phase: str) -> None:
        rows = (trace.is_decode == (phase == "decode")).nonzero()[0]
        if len(rows) < 2:
            raise ValueError(f"trace: {len(rows)} tokens of phase {phase!r} are not allowed; it must have at least 2")
        layers = chosen_layers(trace.num_layers)
        half = len(rows) // 2
        self._num_experts = trace.num_experts
        self._experts_TLK = trace.experts[rows[half:]][:, layers]
        first_TLK = trace.experts[rows[:half]][:, layers]
        counted = [self._count(first_TLK[:, layer]) for layer in range(len(layers))]
        self._plan_load_LE = np.stack(counted).astype(np.float64)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that steps are taken from."""
        return len(self._experts_TLK)

    @property
    def plan_load(self) -> Floats:
        return self._plan_load_LE

    def _count(self, experts: npt.NDArray[np.uint16]) -> Ints:
        used = experts[experts != UNUSED]
        return np.bincount(used, minlength=self._num_experts).astype(np.int64)

    def counts(self, layer: int, num_tokens: int, draw: int) -> Ints:
        experts_TK = self._experts_TLK[:, layer]
        start = int(draw * 0.618034 % 1 * self.num_tokens)  # the golden ratio spreads any number of draws
        whole, rest = divmod(num_tokens, self.num_tokens)
        ordered_TK = np.roll(experts_TK, -start, axis=0)[:rest]
        return whole * self._count(experts_TK) + self._count(ordered_TK)

    def hits(self, layer: int, share_EW: Floats) -> Floats:
        experts_TK = self._experts_TLK[:, layer][:: max(self.num_tokens // SPREAD_TOKENS, 1)][:SPREAD_TOKENS]
        with_none_EW = np.concatenate((share_EW, np.zeros((1, share_EW.shape[1]))))
        share_TKW = with_none_EW[np.minimum(experts_TK, self._num_experts)]
        found: Floats = (1 - np.prod(1 - share_TKW, axis=1)).mean(axis=0)
        return found


def chosen_layers(num_layers: int) -> npt.NDArray[np.intp]:
    """Indices of the layers that represent all."""
    return np.unique(np.linspace(0, num_layers - 1, min(num_layers, MAX_LAYERS)).astype(np.intp))


def _inclusion(load_E: Floats, top_k: int) -> Floats:
    """[E]: 1 - exp(-p s), adding up to K; an expert without load counts with a millionth of the mean load."""
    share_E = np.maximum(load_E / (load_E.mean() or 1.0), 1e-6)
    if top_k == len(share_E):
        return np.ones_like(share_E)
    low, high = 0.0, 1.0
    while -np.expm1(-high * share_E).sum() < top_k and high < 1e9:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-middle * share_E).sum() < top_k else (low, middle)
    found: Floats = -np.expm1(-high * share_E)
    return found


def _scaled(load_E: Floats, top_k: int) -> Floats:
    """[E]: probabilities in proportion to the load, adding up to K, none above 1."""
    if not load_E.any():
        return np.full_like(load_E, top_k / len(load_E))
    found: Floats = np.minimum(load_E * (top_k / load_E.sum()), 1.0)
    return found
