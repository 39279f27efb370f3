"""The placement with which an engine starts. No torch."""

from __future__ import annotations

from pathlib import Path

from moe_runtime.balancer.placement import Placement
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig


def slots_per_rank(config: EngineConfig, model: ModelConfig, num_ranks: int) -> tuple[int, ...]:
    """Slots of each rank in a sparse layer: for its share of the experts, for redundant experts, and a shadow slot.

    The shadow slot receives copies. It stays empty except during a move. A rank that holds all experts has none.
    """
    share = -(-model.moe.num_experts // num_ranks)
    if num_ranks == 1:
        return (share,)
    redundant = config.redundant_experts
    counts = [redundant] * num_ranks if isinstance(redundant, int) else redundant
    return tuple(share + count + 1 for count in counts)


def initial_placement(config: EngineConfig, model: ModelConfig, num_ranks: int) -> Placement:
    """The placement of the file, if there is one; otherwise the experts in order, evenly. It fits each rank's slots.

    Raises:
        ValueError: the file does not fit the model or the ranks.
    """
    num_slots = slots_per_rank(config, model, num_ranks)
    if config.placement is None:
        return Placement.even(model.moe_layers, model.moe.num_experts, num_ranks).in_slots(num_slots)
    placement = Placement.load(Path(config.placement))
    for what, found, wanted in (
        ("layers", placement.layer_ids, model.moe_layers),
        ("experts", placement.num_experts, model.moe.num_experts),
        ("ranks", placement.num_ranks, num_ranks),
    ):
        if found != wanted:
            raise ValueError(f"placement: {config.placement} is for {what} {found}, but this run has {wanted}")
    used_W = (placement.slots >= 0).sum(axis=2).max(axis=0).tolist()
    for rank, (used, slots) in enumerate(zip(used_W, num_slots, strict=True)):
        if used > slots - 1:
            raise ValueError(
                f"placement: {config.placement} has {used} experts on rank {rank}; with redundant_experts "
                f"{config.redundant_experts} it may have {slots - 1}"
            )
    return placement.in_slots(num_slots)
