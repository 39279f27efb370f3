"""How far a model is from another one on texts. Shape suffixes: T tokens, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Loss:
    """Means over the tokens of a text, or over texts of the same length.

    Attributes:
        divergence: KL divergence from the reference's distribution, in nats.
        agreement: share of positions at which both have the same most probable token.
        loss: negative log-likelihood of the next token, in nats.
    """

    divergence: float
    agreement: float
    loss: float

    @classmethod
    def of(cls, expected_TV: Tensor, found_TV: Tensor, tokens: list[int]) -> Loss:
        """Of a text.

        Args:
            expected_TV, found_TV: log-probabilities of the reference and of the model.
            tokens: T of them; the first one is not predicted.
        """
        divergence_T = (expected_TV.exp() * (expected_TV - found_TV)).sum(-1)
        same_T = expected_TV.argmax(-1) == found_TV.argmax(-1)
        next_T = found_TV.new_tensor(tokens[1:]).long()
        return cls(float(divergence_T.mean()), float(same_T.double().mean()), float(F.nll_loss(found_TV[:-1], next_T)))

    @classmethod
    def mean(cls, losses: Sequence[Loss]) -> Loss:
        """Of texts of the same length."""
        values = ((each.divergence, each.agreement, each.loss) for each in losses)
        return cls(*(sum(column) / len(losses) for column in zip(*values, strict=True)))

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)
