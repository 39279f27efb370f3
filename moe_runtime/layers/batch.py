"""One rank's share of a step, as tensors on its device.

Shape suffixes: T tokens, L sparse layers, P policies, K experts per token, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_runtime.kernels.attention import AttentionMetadata, DecodeRows
from moe_runtime.wire.messages import ExpertWork


@dataclass(frozen=True)
class StepPolicies:
    """The expert policies that a step applies to all gates.

    Attributes:
        policy_T: int64, the policy number of each token, 0 for none; None: no token has one.
        policies_LP4: float32, the rows of `ExpertPolicy` for each layer and policy; the first is not read.
        live_T: bool, False for padding rows, which use no expert and are not counted; None: no padding.
        chosen_LTK: int16, filled by the gates with the experts that each token uses, -1 for none; None: not kept.
    """

    policy_T: Tensor | None = None
    policies_LP4: Tensor | None = None
    chosen_LTK: Tensor | None = None
    live_T: Tensor | None = None


@dataclass
class StepLimits:
    """Inputs of capacity and load-aware routing in a step, and their effects; see `capacity`.

    Attributes:
        rank_rows_LW: float64, rows that each rank's experts computed in an earlier step; None: unknown.
        changes_T3: int64, assignments of each token that were moved, rerouted and dropped; layers add to it.
        rows_L: int64, rows that experts compute here; layers add to it.
        extra_rounds: dispatch rounds beyond one in each layer.
    """

    rank_rows_LW: Tensor | None
    changes_T3: Tensor
    rows_L: Tensor
    extra_rounds: int = 0


@dataclass(frozen=True)
class BatchPages:
    """A step's keys and values in the layers of one page group.

    Attributes:
        cache_position_T: where each token's key and value go: page * block size + offset.
        attention: pages and lengths per sequence; `DecodeRows` in padded steps, see `decode_graphs`.
    """

    cache_position_T: Tensor
    attention: AttentionMetadata | DecodeRows


@dataclass(frozen=True)
class Batch:
    """A step's inputs to the layers, apart from its tokens; decode rows come first.

    Attributes:
        position_T: of each token, int64.
        num_prompt_T: length of the prompt of each token's sequence.
        pages: of each page group.
        num_decode: this many leading tokens are decode rows.
        dispatcher, tokens_per_rank: from the plan.
        expert_work: list to which sparse layers add their experts' work; None in steps that are not measured.
        policies: expert policies of the tokens, and memory for their experts; None if no token needs either.
        limits: of experts and ranks, or None.
    """

    position_T: Tensor
    num_prompt_T: Tensor
    pages: Sequence[BatchPages]
    num_decode: int
    dispatcher: str
    tokens_per_rank: list[int]
    expert_work: list[ExpertWork] | None = None
    policies: StepPolicies | None = None
    limits: StepLimits | None = None

    @property
    def max_context(self) -> int:
        """At least the largest position plus one."""
        return self.pages[0].attention.max_context
