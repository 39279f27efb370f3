"""Between the plan and the gates: expert policies of a step's tokens, and the experts that the tokens used.

Shape suffixes: T tokens, L sparse layers, P policies, K experts per token.
"""

from __future__ import annotations

import torch

from moe_runtime.config.model import ModelConfig
from moe_runtime.layers.batch import StepPolicies
from moe_runtime.types.expert_policy import ExpertPolicy
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.messages import RankPlan, RoutedExperts
from moe_runtime.worker.rank_step import PreparedStep


def step_policies(
    work: RankPlan, params: list[SamplingParams], model: ModelConfig, device: torch.device, *, keep_all: bool
) -> StepPolicies | None:
    """The expert policies of a step, and memory to keep its tokens' experts; None if the step needs neither.

    Args:
        params: of each chunk's sequence.
        keep_all: keep the experts of all tokens, even if their requests do not ask for them.
    """
    keeps = keep_all or any(each.return_routed_experts for each in params)
    policies = [each.routing for each in params if not isinstance(each.routing, str)]
    assert len(policies) == len(params), "the front has resolved all classes"
    if not keeps and not any(policies):
        return None
    moe, num_layers = model.moe, len(model.moe_layers)
    policy_T = policies_LP4 = chosen_LTK = None
    if any(policies):
        index = {policy: number for number, policy in enumerate(dict.fromkeys([None, *policies]))}
        numbers = [
            number
            for chunk, policy in zip(work.chunks, policies, strict=True)
            for number in [index[policy]] * chunk.num_tokens
        ]
        policy_T = torch.tensor(numbers, dtype=torch.int64, device=device)
        rows = [(policy or ExpertPolicy()).rows(num_layers, moe.top_k) for policy in index]
        policies_LP4 = torch.tensor(rows, device=device).transpose(0, 1).contiguous()
    if keeps:
        chosen_LTK = torch.empty(num_layers, work.num_tokens, moe.top_k, dtype=torch.int16, device=device)
    return StepPolicies(policy_T, policies_LP4, chosen_LTK)


def routed_experts(step: PreparedStep, *, keep_all: bool) -> list[RoutedExperts]:
    """The experts of the chunks whose sequences ask for them, or of all chunks; call it after the step."""
    if step.policies is None or step.policies.chosen_LTK is None:
        return []
    experts_TLK = step.policies.chosen_LTK.transpose(0, 1).cpu().numpy()
    found, row = [], 0
    for index, (chunk, sequence) in enumerate(zip(step.work.chunks, step.sequences, strict=True)):
        if keep_all or sequence.params.return_routed_experts:
            experts = experts_TLK[row : row + chunk.num_tokens].tobytes()
            found.append(RoutedExperts(chunk.seq_id, chunk.start, index < step.work.num_decode, experts))
        row += chunk.num_tokens
    return found
