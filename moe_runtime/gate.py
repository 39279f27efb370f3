"""The gate: router scores and the top k experts of each token.

Shape suffixes: T tokens, D hidden, E logical experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_runtime.config import MoEConfig
from moe_runtime.kernels import ops


class Gate:
    """Scores every expert for every token and keeps the best K, as the model's family defines it.

    Args:
        config: scoring, groups, normalisation.
        weight_ED: the router; float32 where the family computes it so.
        correction_bias_E: float32 bias that takes part in choosing only (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        counts_2E: int64, tokens of each expert in prefill and decode; grows with every call, without a device sync.
    """

    def __init__(
        self, config: MoEConfig, weight_ED: Tensor, correction_bias_E: Tensor | None, counts_2E: Tensor
    ) -> None:
        self.config = config
        self.weight_ED = weight_ED
        self.correction_bias_E = correction_bias_E
        self.counts_2E = counts_2E

    @property
    def nbytes(self) -> int:
        return self.weight_ED.nbytes

    def __call__(self, x_TD: Tensor, num_decode: int) -> tuple[Tensor, Tensor]:
        """`(weights_TK float32, experts_TK int64)`, best expert first; the first `num_decode` rows count as decode."""
        logits_TE = F.linear(x_TD.to(self.weight_ED.dtype), self.weight_ED)
        weights_TK, experts_TK = ops.topk_gate(
            logits_TE,
            top_k=self.config.top_k,
            scoring=self.config.scoring,
            correction_bias_E=self.correction_bias_E,
            num_groups=self.config.num_groups,
            topk_groups=self.config.topk_groups,
            normalize=self.config.normalize_topk,
            scale=self.config.routed_scaling_factor,
        )
        for phase, chosen in ((1, experts_TK[:num_decode]), (0, experts_TK[num_decode:])):
            if chosen.numel():
                ones = torch.ones_like(chosen).flatten()
                self.counts_2E[phase].scatter_add_(0, chosen.flatten(), ones)
        return weights_TK, experts_TK
