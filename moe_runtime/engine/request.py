"""One prompt and its continuation: all the state that cannot be recomputed, and the rank and pages of the sequence.

Two counts run ahead of what the front knows, so that a step can be planned while another runs. `num_planned` positions
have been planned for the rank. `num_pending` tokens are not known yet, but will be when all submitted steps are done.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.engine.page_pool import HeldPages
from moe_runtime.engine.prefix_index import PageKeys
from moe_runtime.text.detokenizer import OutputText
from moe_runtime.types.outputs import ExpertChanges, OutputDelta, PositionLogprobs
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np

OUTPUT_GUESS = 256  # tokens that an output counts for at most: few use their limit


@dataclass(eq=False)
class Request:
    """A sequence that is waiting, or running on a rank.

    Attributes:
        seq_id: grows with every request, so it also gives the order of arrival.
        token_ids: the prompt, then the output tokens received so far.
        max_output_tokens: number of output tokens at which the request ends.
        user: whom its tokens count for when requests wait; see `engine.waiting`.
        output_text: turns tokens into text; None without a tokenizer.
        prompt_logprobs: those received so far; the first token has None. The whole list is None if not asked for.
        routed_experts: those received so far, if asked for: parts [tokens, layers, experts per token] in order of
            position.
        expert_changes: changes so far; tokens recomputed after a preemption count again.
        arrived_at: time at which the server or the caller got it.
        takes_default_routing: it sets no expert policy.
        overload_routing: the policy that it got because the queue was long; see `engine.overload`.
        scheduled_at: time at which a rank first admitted it.
        rank: the rank that runs it; None while it waits.
        pages: its pages on that rank, of each page group.
        num_prefill_tokens: tokens it had when the rank admitted it; later tokens are decode rows.
        page_keys: keys of its pages in the prefix index; None if the engine caches no prefixes.
        grammar: what its output follows; empty for any output.
        num_cached_tokens: tokens of the prompt that were not computed, as pages had them when it was first admitted.
        num_indexed, has_tail: how many of its pages the index has been offered, and whether also the page in which the
            prompt ends.
    """

    request_id: str
    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    max_output_tokens: int
    user: str = ""
    arrived_at: float = 0.0
    takes_default_routing: bool = False
    output_text: OutputText | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    routed_experts: list[np.ndarray] = field(default_factory=list)
    expert_changes: ExpertChanges = field(default_factory=ExpertChanges)
    overload_routing: str | None = None
    scheduled_at: float | None = None
    rank: int | None = None
    pages: list[HeldPages] = field(default_factory=list)
    num_prefill_tokens: int = 0
    num_planned: int = 0
    num_pending: int = 0
    page_keys: PageKeys | None = None
    grammar: str = ""
    num_cached_tokens: int = 0
    num_indexed: int = 0
    has_tail: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """Its place among running requests. When pages run out, the last is preempted."""
        return self.params.priority, self.seq_id

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_tokens(self) -> int:
        """Tokens of the prompt and the output at which the request ends at the latest."""
        return self.num_prompt_tokens + self.max_output_tokens

    @property
    def may_reuse(self) -> bool:
        """Whether tokens may come from the prefix cache: not if the request asks for something of every position."""
        return self.params.prompt_logprobs is None and not self.params.return_routed_experts

    @property
    def num_remaining(self) -> int:
        """Tokens that a rank still has to compute: of the prompt, and with a guess of the output's length."""
        of_output = min(self.max_output_tokens - self.num_output_tokens, OUTPUT_GUESS)
        return self.num_future_tokens - self.num_planned + of_output

    @property
    def num_routed(self) -> int:
        """Positions whose experts are known."""
        return sum(map(len, self.routed_experts))

    @property
    def num_future_tokens(self) -> int:
        """Tokens that the sequence will have when all submitted steps are done."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_unplanned(self) -> int:
        """Positions that the next step may run; 0 once the last token that the length limit allows is in flight."""
        if self.num_future_tokens - self.num_prompt_tokens >= self.max_output_tokens:
            return 0
        return self.num_future_tokens - self.num_planned

    @property
    def is_decoding(self) -> bool:
        """Whether the next row is for a token that the rank sampled itself."""
        return self.num_planned >= self.num_prefill_tokens

    def append(self, token_id: int, eos_token_ids: Collection[int]) -> tuple[str | None, int | str | None]:
        """Add the oldest pending token. Returns finish_reason and stop_reason; both are None if the request goes on."""
        assert self.num_pending > 0
        self.num_pending -= 1
        self.token_ids.append(token_id)
        finish_reason: str | None = None
        stop_reason: int | str | None = None
        may_stop = self.num_output_tokens > self.params.min_tokens
        if token_id in eos_token_ids and not self.params.ignore_eos:
            finish_reason = "stop"
        elif token_id in self.params.stop_token_ids:
            finish_reason, stop_reason = "stop", token_id
        is_full = self.num_output_tokens == self.max_output_tokens
        if self.output_text is not None:
            hidden = finish_reason is not None and not self.params.include_stop_str_in_output
            last = is_full or finish_reason is not None
            stop = self.output_text.append(None if hidden else token_id, last, may_stop)
            if stop is not None:
                return "stop", stop
        return finish_reason or ("length" if is_full else None), stop_reason

    def delta(
        self,
        token_ids: list[int],
        logprobs: list[PositionLogprobs] | None,
        finish_reason: str | None,
        stop_reason: int | str | None = None,
        error: str | None = None,
    ) -> OutputDelta:
        """The delta for the last `token_ids`, with the text that can no longer change."""
        is_first = self.num_output_tokens == len(token_ids)
        return OutputDelta(
            request_id=self.request_id,
            text=self.output_text.release(finish_reason is not None) if self.output_text is not None else "",
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_cached_tokens=self.num_cached_tokens,
            prompt_token_ids=self.token_ids[: self.num_prompt_tokens] if is_first else None,
            prompt_logprobs=self.prompt_logprobs if is_first else None,
            error=error,
            scheduled_at=self.scheduled_at if is_first else None,
        )
