"""The placement that an engine begins with. No torch."""

from __future__ import annotations

from pathlib import Path

from moe_runtime.balancer.placement import Placement
from moe_runtime.config import EngineConfig, ModelConfig


def slots_per_rank(config: EngineConfig, model: ModelConfig, num_ranks: int) -> int:
    """Slots of a rank in each sparse layer: its share of the experts, the redundant ones, and one to copy into.

    That one, the shadow, is empty but while an expert moves; a rank that holds everything has none.
    """
    share = -(-model.moe.num_experts // num_ranks)
    return share if num_ranks == 1 else share + config.redundant_experts + 1


def initial_placement(config: EngineConfig, model: ModelConfig, num_ranks: int) -> Placement:
    """The file's placement if there is one, else the experts in order, evenly; in as many slots as ranks have.

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
            raise ValueError(f"placement: {config.placement} is for {what} {found}, but here are {wanted}")
    used = int((placement.slots >= 0).sum(axis=2).max())
    if used > num_slots - 1:
        raise ValueError(
            f"placement: {config.placement} has {used} experts on a rank; with redundant_experts "
            f"{config.redundant_experts} it may have {num_slots - 1}"
        )
    return placement.in_slots(num_slots)
