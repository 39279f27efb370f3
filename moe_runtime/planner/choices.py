"""Predicts all requested choices, and recommends one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_runtime.balancer.plan import plan_placement
from moe_runtime.planner.hardware import Hardware
from moe_runtime.planner.predict import Phase, Prediction, Workload, predict
from moe_runtime.planner.routing import Routing
from moe_runtime.planner.shape import ModelShape

MAX_RANKS = 4096
NEGLIGIBLE_GAIN = 0.01  # a choice with more ranks, slots or sequences must gain more than this


@dataclass(frozen=True)
class Choice:
    """A number of ranks, of redundant slots and of sequences, and its prediction.

    Attributes:
        redundant: slots per rank and layer in addition to those for one copy of every expert.
        batch: sequences per rank.
        weights: how experts are held.
    """

    weights: str
    ranks: int
    redundant: int
    batch: int
    prediction: Prediction

    @property
    def tokens_per_second_rank(self) -> float:
        return self.prediction.tokens_per_second / self.ranks


def evaluate(
    shape: ModelShape,
    hardware: Hardware,
    routing: Routing,
    *,
    ranks: Sequence[int],
    redundant: Sequence[int],
    batches: Sequence[int],
    phase: Phase,
    length: int,
) -> Iterator[Choice]:
    """Predict each choice, in order of ranks, redundant slots and batches. One rank has no redundant slots.

    Raises:
        ValueError: a value is not allowed.
    """
    for name, values, least, most in (
        ("ranks", ranks, 1, MAX_RANKS),
        ("redundant", redundant, 0, shape.num_experts),
        ("batch", batches, 1, 1 << 20),
    ):
        for value in values:
            if not least <= value <= most:
                raise ValueError(f"{name}: {value} is not allowed; it must be from {least} to {most}")
    for num_ranks in ranks:
        share = -(-shape.num_experts // num_ranks)
        for extra in redundant if num_ranks > 1 else redundant[:1]:
            slots = share if num_ranks == 1 else min(share + extra, shape.num_experts)
            placement = plan_placement(routing.plan_load, num_ranks, slots).placement
            for batch in batches:
                work = Workload(phase, batch * num_ranks, length)
                found = predict(shape, hardware, placement, routing, work)
                yield Choice(shape.weights, num_ranks, slots - share, batch, found)


def recommend(choices: Sequence[Choice], max_step_seconds: float | None = None) -> Choice | None:
    """The choice with the most tokens per second and rank, among those that fit and whose step is short enough.

    Among choices within 1% of the best, it takes the one with the fewest ranks, then redundant slots, then sequences.
    None if no choice is left.
    """
    allowed = [
        choice
        for choice in choices
        if choice.prediction.fits and (max_step_seconds is None or choice.prediction.step_seconds <= max_step_seconds)
    ]
    if not allowed:
        return None
    best = max(choice.tokens_per_second_rank for choice in allowed)
    near = [choice for choice in allowed if choice.tokens_per_second_rank >= best * (1 - NEGLIGIBLE_GAIN)]
    return min(near, key=lambda choice: (choice.ranks, choice.redundant, choice.batch))
