"""What every request must obey. No torch.

HTTP checks a request by these rules before it reaches the engine's thread, so that a refusal does not wait for a step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moe_runtime.config.expert_policy import ExpertPolicies
from moe_runtime.types.expert_policy import ExpertPolicy
from moe_runtime.types.sampling_params import SamplingParams


@dataclass(frozen=True)
class RequestRules:
    """Limits of the model and the engine.

    Attributes:
        vocab_size: of the model.
        max_model_len: maximum length of prompt plus output.
        has_tokenizer: whether text can be read and written.
        policies: the expert policies that a request may ask for.
    """

    vocab_size: int
    max_model_len: int
    has_tokenizer: bool
    policies: ExpertPolicies

    def check(self, prompt: Sequence[int], params: SamplingParams) -> ExpertPolicy | None:
        """Check a request. Returns the expert policy that applies to it.

        Raises:
            ValueError: the request cannot be served; the message says why.
        """
        if params.stop and not self.has_tokenizer:
            raise ValueError("stop: stop strings need a tokenizer; use stop_token_ids with skip_tokenizer_init")
        if not prompt:
            raise ValueError("prompt: it is empty; at least one token is needed")
        self.check_length(len(prompt), params)
        self._check_ids("prompt", prompt)
        self._check_ids("logit_bias", params.logit_bias or ())
        self._check_ids("stop_token_ids", params.stop_token_ids)
        return self.policies.resolve(params.routing)

    def check_length(self, num_tokens: int, params: SamplingParams, *, at_least: bool = False) -> None:
        """Raise ValueError for a prompt that leaves no room for a token of output, unless none is asked for.

        Args:
            at_least: the prompt may have more than `num_tokens`.
        """
        if num_tokens + (params.max_tokens != 0) > self.max_model_len:
            count = f"at least {num_tokens}" if at_least else str(num_tokens)
            room = "" if params.max_tokens == 0 else " and at least one must be left for the output"
            raise ValueError(f"prompt: {count} tokens, but max_model_len is {self.max_model_len}{room}")

    def _check_ids(self, field: str, token_ids: Collection[int]) -> None:
        if (
            set(map(type, token_ids)) <= {int}
            and 0 <= min(token_ids, default=0) <= max(token_ids, default=0) < self.vocab_size
        ):
            return
        wrong = next(token for token in token_ids if type(token) is not int or not 0 <= token < self.vocab_size)
        raise ValueError(
            f"{field}: token id {wrong!r} is not allowed; it must be an integer from 0 to {self.vocab_size - 1}"
        )
