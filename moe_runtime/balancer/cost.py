"""How long a sparse layer takes under a placement, fitted from measured steps.

A layer takes as long as its slowest rank. A rank must read the weights of every slot that has a token in the step, and
compute every row. With few rows (decode) the reading takes the time, with many (prefill) the computing. If an expert
has few rows in a step, a second replica is read as well, and may cost more than it saves.

Shape suffixes: L MoE layers, E logical experts, W ranks, S slots per rank, N measured steps, C coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.checks import check_load, check_speed
from moe_runtime.balancer.flow import Floats
from moe_runtime.balancer.placement import Placement
from moe_runtime.balancer.split import split_tokens

MAX_REFITS = 20


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer: fixed + the maximum over ranks of (per slot x touched slots + per row x rows) / speed."""

    seconds_per_slot: float
    seconds_per_row: float
    seconds_fixed: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seconds_per_slot", "seconds_per_row", "seconds_fixed"):
            value = getattr(self, name)
            if not 0 <= value < np.inf:
                raise ValueError(f"{name}: {value} is not allowed; it must be finite and at least 0")

    @classmethod
    def fit(cls, touched: npt.ArrayLike, rows: npt.ArrayLike, seconds: npt.ArrayLike) -> LayerTime:
        """The times that fit measured layers best: least squares, none of them negative.

        The times determine which rank was the slowest, and the slowest ranks determine the times. The two are computed
        alternately.

        Args:
            touched: [N, W], slots with at least one row, per measured layer and rank.
            rows: [N, W], rows.
            seconds: [N], how long the layer took.

        Raises:
            ValueError: shapes that do not match, or values that are negative or not finite.
        """
        touched_NW = check_load("touched", touched, ("layers measured", "ranks"))
        rows_NW = check_load("rows", rows, ("layers measured", "ranks"))
        seconds_N = check_load("seconds", seconds, ("layers measured",))
        if not touched_NW.shape == rows_NW.shape == (len(seconds_N), rows_NW.shape[1]):
            raise ValueError(
                f"seconds: {len(seconds_N)} layers are not allowed with touched of shape {touched_NW.shape} and rows "
                f"of {rows_NW.shape}; they must agree"
            )
        number_N = np.arange(len(seconds_N))
        slowest_N = (touched_NW / (touched_NW.mean() or 1) + rows_NW / (rows_NW.mean() or 1)).argmax(axis=1)
        for _ in range(MAX_REFITS):
            terms_NC = np.stack(
                [touched_NW[number_N, slowest_N], rows_NW[number_N, slowest_N], np.ones(len(seconds_N))], axis=1
            )
            per_slot, per_row, fixed = least_squares(terms_NC, seconds_N)
            before_N, slowest_N = slowest_N, (per_slot * touched_NW + per_row * rows_NW).argmax(axis=1)
            if (slowest_N == before_N).all():
                break
        return cls(per_slot, per_row, fixed)

    def seconds(self, rows_E: Floats, slots_WS: npt.NDArray[np.integer], rank_speed: npt.ArrayLike | None) -> float:
        """A layer's expected time with `rows_E` rows per expert in a step, shared by `split_tokens`.

        A slot with m expected rows has at least one row with probability 1 - exp(-m) (Poisson distribution).
        """
        rows_EW = split_tokens(rows_E, slots_WS, rank_speed) * rows_E[:, None]
        time_W = -np.expm1(-rows_EW).sum(axis=0) * self.seconds_per_slot + rows_EW.sum(axis=0) * self.seconds_per_row
        return self.seconds_fixed + float((time_W / check_speed(rank_speed, len(time_W))).max())

    def step_seconds(
        self, rows_LE: npt.ArrayLike, placement: Placement, rank_speed: npt.ArrayLike | None = None
    ) -> float:
        """The expected time of all sparse layers in a step that has `rows_LE` rows per layer and expert.

        Raises:
            ValueError: rows that are negative, not finite or of another shape than the placement.
        """
        rows_LE = check_load("rows", rows_LE, ("layers", "experts"))
        if rows_LE.shape != (placement.num_layers, placement.num_experts):
            raise ValueError(
                f"rows: shape {rows_LE.shape} is not allowed; "
                f"it must be {(placement.num_layers, placement.num_experts)}, the shape of the placement"
            )
        return sum(self.seconds(*layer, rank_speed) for layer in zip(rows_LE, placement.slots, strict=True))


def least_squares(terms_NC: Floats, seconds_N: Floats) -> tuple[float, ...]:
    """Non-negative least squares, by trying every set of terms; there must be only a few terms."""
    num_terms = terms_NC.shape[1]
    scale_C = np.where(terms_NC.max(axis=0) > 0, terms_NC.max(axis=0), 1)
    best, least = np.zeros(num_terms), float((seconds_N**2).sum())
    for size in range(1, num_terms + 1):
        for chosen in map(list, combinations(range(num_terms), size)):
            solution = np.linalg.lstsq(terms_NC[:, chosen] / scale_C[chosen], seconds_N, rcond=None)[0]
            error = float(((terms_NC[:, chosen] / scale_C[chosen] @ solution - seconds_N) ** 2).sum())
            if (solution >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(num_terms), error
                best[chosen] = solution / scale_C[chosen]
    return tuple(best.tolist())
