"""The gate: scores and the top k experts of each token.

Shape suffixes: T tokens, D hidden, E logical experts, K experts per token, L sparse layers, P policies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_runtime.config.model import MoEConfig
from moe_runtime.kernels import ops
from moe_runtime.kernels.forms import USUAL, Forms
from moe_runtime.layers.batch import StepPolicies


class TorchGate:
    """Scores every expert for every token and keeps the best K, as the model's family defines it.

    Args:
        config: scoring, groups, normalisation.
        weight_ED: of the gate; float32 if the family computes the gate in float32.
        logit_bias_E: added to the product, in the weight's dtype; or None.
        correction_bias_E: float32 bias that affects the choice only (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        counts_2E: int64, tokens of each expert in prefill and decode; every call adds to them, without a device sync.
            None counts nothing.
        layer: number of the sparse layer.
        forms: of the gate's product.
    """

    def __init__(
        self,
        config: MoEConfig,
        weight_ED: Tensor,
        logit_bias_E: Tensor | None,
        correction_bias_E: Tensor | None,
        counts_2E: Tensor | None,
        layer: int,
        forms: Forms = USUAL,
    ) -> None:
        self.forms = forms
        self.config = config
        self.weight_ED = weight_ED
        self.logit_bias_E = logit_bias_E
        self.correction_bias_E = correction_bias_E
        self.counts_2E = counts_2E
        self.layer = layer

    @property
    def nbytes(self) -> int:
        return self.weight_ED.nbytes + (0 if self.logit_bias_E is None else self.logit_bias_E.nbytes)

    def __call__(
        self, x_TD: Tensor, num_decode: int, policies: StepPolicies | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `layers.kit.Gate`."""
        logits_TE = self.forms.linear(x_TD.to(self.weight_ED.dtype), self.weight_ED, self.logit_bias_E)
        weights_TK, experts_TK = ops.topk_gate(
            logits_TE,
            top_k=self.config.top_k,
            scoring=self.config.scoring,
            correction_bias_E=self.correction_bias_E,
            num_groups=self.config.num_groups,
            topk_groups=self.config.topk_groups,
            groups_by_best=self.config.groups_by_best,
            normalize=self.config.normalize_topk,
            scale=self.config.routed_scaling_factor,
        )
        if policies is not None:
            if policies.policy_T is not None and policies.policies_LP4 is not None:
                policy_T4 = policies.policies_LP4[self.layer][policies.policy_T]
                weights_TK, experts_TK = drop_experts(self.config, policy_T4, logits_TE, weights_TK, experts_TK)
            if policies.live_T is not None:
                experts_TK = experts_TK.masked_fill(~policies.live_T[:, None], -1)
            if policies.chosen_LTK is not None:
                policies.chosen_LTK[self.layer] = experts_TK
        if self.counts_2E is not None:
            count_choices(self.counts_2E, experts_TK, num_decode)
        return weights_TK, experts_TK, logits_TE


def count_choices(counts_2E: Tensor, experts_TK: Tensor, num_decode: int) -> None:
    """Count each expert's tokens in prefill and decode. The first `num_decode` rows are decode; -1 is no expert."""
    for phase, chosen in ((1, experts_TK[:num_decode]), (0, experts_TK[num_decode:])):
        if chosen.numel():
            used = (chosen >= 0).long().flatten()
            counts_2E[phase].scatter_add_(0, chosen.clamp(min=0).flatten(), used)


def drop_experts(
    config: MoEConfig, policy_T4: Tensor, logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply each token's policy to its gate's choice; see `ExpertPolicy`. A dropped expert becomes -1 with weight 0.

    A token that keeps all its experts keeps its weights, bit for bit.

    Args:
        policy_T4: float32; maximum experts, mass, threshold and 1 / temperature of each token.
    """
    top_k_T1, mass_T1, threshold_T1, sharpness_T1 = policy_T4.split(1, dim=1)
    logits_TE = logits_TE.float()
    scores_TE = (logits_TE * sharpness_T1 if config.scoring == "sigmoid" else logits_TE).softmax(-1)
    probability_TK = scores_TE.gather(1, experts_TK)
    mass_before_TK = F.pad(probability_TK.cumsum(1)[:, :-1], (1, 0))
    place_K = torch.arange(experts_TK.shape[1], device=experts_TK.device)
    kept_TK = (place_K < top_k_T1) & ~(mass_before_TK >= mass_T1)  # NaN keeps the expert
    best_T1 = probability_TK.masked_fill(~kept_TK, 0.0).amax(1, keepdim=True)
    kept_TK &= ~(probability_TK < threshold_T1 * best_T1)
    left_TK = weights_TK.masked_fill(~kept_TK, 0.0)
    if config.normalize_topk:
        normal_TK = left_TK / (left_TK.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
        left_TK = torch.where(kept_TK.all(1, keepdim=True), left_TK, normal_TK)
    return left_TK, experts_TK.masked_fill(~kept_TK, -1)
