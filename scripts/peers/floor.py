"""The least time that a phase can take on this machine, from its bytes and operations. No torch, no processes.

A step must read the weights of every layer that all tokens use, the head, the experts that its tokens chose, and the
keys and values so far (`peers.sizes`). It can't read them faster than the memory bandwidth. It also can't multiply
faster than a large matrix product runs. The longer of the two times is the floor. An engine's weights count with the
bytes in which the engine stores them. Embedding rows, activations and other omitted work make the floor lower than what
can be reached, never higher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peers.sizes import Sizes

BYTES = 2  # of a key or a value in bfloat16, and of a weight that an engine stores unchanged


@dataclass(frozen=True)
class Rates:
    """Rates measured together with an engine: bytes and operations per second of all cores, and of one rank's share."""

    bytes_per_s_all: float
    bytes_per_s_rank: float
    flops_per_s_all: float
    flops_per_s_rank: float

    @classmethod
    def mean(cls, before: Mapping[str, float], after: Mapping[str, float]) -> Rates:
        """The mean of two measurements, one before and one after an engine's turn."""
        return cls(**{name: (before[name] + after[name]) / 2 for name in before})


@dataclass(frozen=True)
class Routing:
    """Touched experts, or rows sent to experts, summed over layers: of all ranks, and of each layer's busiest rank."""

    total: float
    largest: float


def decode_step_seconds(
    sizes: Sizes, rates: Rates, touched: Routing, *, batch: int, context: float, ranks: int, weight_bytes: float = BYTES
) -> float:
    """Floor of a step that gives each of `batch` sequences one token.

    Args:
        touched: distinct experts of the step.
        context: keys per sequence, mean over the steps.
        ranks: 1 uses all cores; several have an equal share each, and sequences are spread evenly.
        weight_bytes: bytes per weight as the engine stores it.
    """
    sequences = _spread(batch, ranks)
    weights = sizes.dense + sizes.head
    kept, scores = sizes.kept(context), sizes.step_scores(context)
    dense_bytes = [weight_bytes * weights + BYTES * count * kept if count else 0.0 for count in sequences]
    dense_flops = [2 * count * (weights + scores) for count in sequences]
    expert_flops = 2.0 * batch * sizes.expert_rows * sizes.expert
    return _floor(
        rates,
        ranks,
        dense_bytes,
        dense_flops,
        _experts(weight_bytes * sizes.expert, touched),
        Routing(expert_flops, expert_flops / ranks),
    )


def prefill_seconds(
    sizes: Sizes,
    rates: Rates,
    touched: Routing,
    rows: Routing,
    *,
    batch: int,
    length: int,
    ranks: int,
    weight_bytes: float = BYTES,
) -> float:
    """Floor of running `batch` prompts of `length` tokens, up to the first token of each.

    Args:
        touched: distinct experts of all prompts.
        rows: rows sent to experts.
        ranks, weight_bytes: as in `decode_step_seconds`.
    """
    sequences = _spread(batch, ranks)
    scores = sizes.prompt_scores(length)
    dense_bytes = [weight_bytes * (sizes.dense + sizes.head) if count else 0.0 for count in sequences]
    dense_flops = [2 * count * (length * sizes.dense + sizes.head + scores) for count in sequences]
    return _floor(
        rates,
        ranks,
        dense_bytes,
        dense_flops,
        _experts(weight_bytes * sizes.expert, touched),
        Routing(2 * sizes.expert * rows.total, 2 * sizes.expert * rows.largest),
    )


def _experts(nbytes: float, touched: Routing) -> Routing:
    return Routing(nbytes * touched.total, nbytes * touched.largest)


def _floor(
    rates: Rates,
    ranks: int,
    dense_bytes: list[float],
    dense_flops: list[float],
    expert_bytes: Routing,
    expert_flops: Routing,
) -> float:
    def reading(part: Routing) -> float:
        return _seconds(part, rates.bytes_per_s_all, rates.bytes_per_s_rank, ranks)

    def multiplying(part: Routing) -> float:
        return _seconds(part, rates.flops_per_s_all, rates.flops_per_s_rank, ranks)

    dense_read, dense_product = (Routing(sum(part), max(part)) for part in (dense_bytes, dense_flops))
    return max(
        reading(dense_read) + reading(expert_bytes),
        multiplying(dense_product) + multiplying(expert_flops),
    )


def _seconds(part: Routing, per_s_all: float, per_s_rank: float, ranks: int) -> float:
    """The longer time: the busiest rank can't exceed its own rate, and all ranks can't exceed the machine's rate."""
    together = part.total / per_s_all
    return together if ranks == 1 else max(together, part.largest / per_s_rank)


def _spread(batch: int, ranks: int) -> list[int]:
    return [batch // ranks + (rank < batch % ranks) for rank in range(ranks)]
