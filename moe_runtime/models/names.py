"""Names of the MLPs' tensors in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertNames:
    """How a family's checkpoints call the sparse block `model.layers.N.<block>` and the three matrices of an expert.

    Checkpoints that store all experts of a layer fused use the same names in every family:
    `model.layers.N.mlp.experts.gate_up_proj` [E, 2F, D] and `.down_proj` [E, D, F].
    """

    block: str
    gate: str
    up: str
    down: str


DENSE_NAMES = ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj")
