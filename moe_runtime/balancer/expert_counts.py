"""Counts of tokens per expert, and what they say about balance.

Shape suffixes: L MoE layers, E logical experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.checks import check_integers
from moe_runtime.balancer.placement import Placement, check_layer_ids

FORMAT = "moe_runtime.expert_load"
FORMAT_VERSION = 1
PHASES = ("prefill", "decode")
NUM_HOTTEST = 10  # named in JSON and HTML


class HotExpert(NamedTuple):
    """An expert, the token rows it got, and their share of all rows of its layer."""

    layer: int
    expert: int
    tokens: int
    share: float


@dataclass(frozen=True, eq=False)
class ExpertCounts:
    """The counts of an `ExpertLoad`, without its files and pictures; see `ExpertLoad`."""

    tokens: Mapping[str, npt.NDArray[np.int64]]
    layer_ids: tuple[int, ...]
    placement: Placement | None = None
    model: str = ""
    top_k: int | None = None

    def __post_init__(self) -> None:
        if set(self.tokens) != set(PHASES):
            raise ValueError(f"tokens: phases {sorted(self.tokens)} are not allowed; they must be {list(PHASES)}")
        tokens = {phase: _checked_counts(phase, self.tokens[phase]) for phase in PHASES}
        shape = tokens["prefill"].shape
        if tokens["decode"].shape != shape:
            raise ValueError(f"tokens: prefill has shape {shape} and decode {tokens['decode'].shape}; they must agree")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "layer_ids", check_layer_ids(self.layer_ids, shape[0]))
        if self.placement is not None and (self.placement.layer_ids, self.placement.num_experts) != (
            self.layer_ids,
            self.num_experts,
        ):
            raise ValueError("placement: is for other layers or another number of experts than the counts")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: {self.top_k} is not allowed; it must be from 1 to {self.num_experts}")

    @property
    def num_layers(self) -> int:
        return len(self.tokens["prefill"])

    @property
    def num_experts(self) -> int:
        return int(self.tokens["prefill"].shape[1])

    @property
    def total(self) -> npt.NDArray[np.int64]:
        """int64 [L, E]: prefill and decode together."""
        return self.tokens["prefill"] + self.tokens["decode"]

    def counts(self, phase: str | None = None) -> npt.NDArray[np.int64]:
        """int64 [L, E]: token rows of a phase."""
        if phase is None:
            return self.total
        if phase not in PHASES:
            raise ValueError(f'phase: {phase!r} is not allowed; it must be "prefill", "decode" or None for both')
        return self.tokens[phase]

    def num_tokens(self, phase: str | None = None) -> int | None:
        """Tokens that went through the layers; None if the counts do not show it.

        The counts show it if `top_k` is known and each token used that many experts in each layer.
        """
        rows_L = self.counts(phase).sum(axis=1)
        if self.top_k is None or (rows_L != rows_L[0]).any() or rows_L[0] % self.top_k:
            return None
        return int(rows_L[0]) // self.top_k

    def rank_load(self, phase: str | None = None) -> npt.NDArray[np.float64]:
        """float64 [L, W]: token rows per rank, an expert's rows shared evenly among its replicas; [L, E] unplaced."""
        counts_LE = self.counts(phase)
        if self.placement is None:
            return counts_LE.astype(np.float64)
        hosts_LWE = self.placement.hosts
        load_LW: npt.NDArray[np.float64] = np.einsum("lwe,le->lw", hosts_LWE, counts_LE / hosts_LWE.sum(axis=1))
        return load_LW

    def balancedness(self, phase: str | None = None) -> npt.NDArray[np.float64]:
        """float64 [L]: mean rank load / max rank load, 1.0 is perfect (and what a layer without tokens gives)."""
        load_LW = self.rank_load(phase)
        return np.minimum(_ratio(load_LW.mean(axis=1), load_LW.max(axis=1)), 1.0)

    def skew(self, phase: str | None = None) -> npt.NDArray[np.float64]:
        """float64 [L]: max expert load / mean expert load, 1.0 is perfect (and what a layer without tokens gives)."""
        counts_LE = self.counts(phase)
        return _ratio(counts_LE.max(axis=1), counts_LE.mean(axis=1))

    def hottest(self, n: int, phase: str | None = None) -> list[HotExpert]:
        """The `n` experts with the most token rows over all layers, most first; experts without tokens are left out.

        `layer` is the layer's index in the model. Equal counts are sorted by layer and expert.
        """
        counts_LE = self.counts(phase)
        rows_L = counts_LE.sum(axis=1)
        order = np.argsort(-counts_LE, axis=None, kind="stable")[: max(n, 0)]
        cells = zip(*np.unravel_index(order, counts_LE.shape), strict=True)
        return [
            HotExpert(self.layer_ids[layer], int(expert), int(tokens), float(tokens / rows_L[layer]))
            for layer, expert in cells
            if (tokens := counts_LE[layer, expert]) > 0
        ]

    def __sub__(self, earlier: ExpertCounts) -> Self:
        """The load of the window from `earlier` to this load, with this load's placement.

        Raises:
            ValueError: the layers or experts of the two differ, or `earlier` is not the earlier one.
        """
        if (self.layer_ids, self.num_experts) != (earlier.layer_ids, earlier.num_experts):
            raise ValueError(
                f"expert load: {earlier.num_layers} layers of {earlier.num_experts} experts cannot be subtracted from "
                f"{self.num_layers} layers of {self.num_experts}; both loads must have the same layers and experts"
            )
        tokens = {phase: self.tokens[phase] - earlier.tokens[phase] for phase in PHASES}
        if any((counts < 0).any() for counts in tokens.values()):
            raise ValueError("expert load: the counts fell; the subtracted load must be an earlier one of the same run")
        return type(self)(tokens, self.layer_ids, self.placement, self.model, self.top_k)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExpertCounts):
            return NotImplemented
        return (
            (self.layer_ids, self.model, self.top_k) == (other.layer_ids, other.model, other.top_k)
            and self.placement == other.placement
            and all(np.array_equal(self.tokens[phase], other.tokens[phase]) for phase in PHASES)
        )

    def to_dict(self) -> dict[str, Any]:
        """The load as plain lists and numbers: the JSON file and the answer of `GET /experts/load`.

        `balancedness`, `hottest` and `num_tokens` are computed from the rest, for convenience. Each has the keys
        "prefill", "decode" and "total".
        """
        by_phase: dict[str, str | None] = {**{phase: phase for phase in PHASES}, "total": None}
        hottest = {key: [hot._asdict() for hot in self.hottest(NUM_HOTTEST, by_phase[key])] for key in by_phase}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "top_k": self.top_k,
            "num_experts": self.num_experts,
            "layer_ids": list(self.layer_ids),
            "phases": {phase: self.tokens[phase].tolist() for phase in PHASES},
            "placement": None if self.placement is None else self.placement.to_dict(),
            "num_tokens": {key: self.num_tokens(phase) for key, phase in by_phase.items()},
            "balancedness": {key: self.balancedness(phase).tolist() for key, phase in by_phase.items()},
            "hottest": hottest,
        }


def _ratio(above_L: npt.NDArray[Any], below_L: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    ratio_L: npt.NDArray[np.float64] = np.divide(above_L, below_L, out=np.ones(len(above_L)), where=below_L > 0)
    return ratio_L


def _checked_counts(phase: str, counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    counts_LE = check_integers(phase, counts, ("layers", "experts")).astype(np.int64)
    if (counts_LE < 0).any():
        raise ValueError(f"{phase}: {counts_LE.min()} is not allowed; counts must be at least 0")
    counts_LE.setflags(write=False)
    return counts_LE
