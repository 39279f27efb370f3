"""One rank's share of a step, as tensors on its device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.messages import ExpertWork


@dataclass(frozen=True)
class Batch:
    """What the model's layers need to know of a step; decode rows come first.

    Attributes:
        token_T, position_T: token ids and their positions, int64.
        num_prompt_T: length of the prompt of each token's sequence.
        slot_T: where each token's key and value go: page * block size + offset.
        attention: pages and lengths per sequence.
        num_decode: so many leading tokens are decode rows.
        dispatcher, tokens_per_rank: as the plan says.
        expert_work: where sparse layers note what their experts did; None in steps that are not measured.
    """

    token_T: Tensor
    position_T: Tensor
    num_prompt_T: Tensor
    slot_T: Tensor
    attention: AttentionMetadata
    num_decode: int
    dispatcher: str
    tokens_per_rank: list[int]
    expert_work: list[ExpertWork] | None = None
