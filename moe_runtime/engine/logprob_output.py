"""Log-probabilities as users see them: with the text of each token. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.engine.request import Request
from moe_runtime.types.outputs import Logprob, PositionLogprobs
from moe_runtime.wire.messages import PromptLogprobs, TokenLogprobs

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer


def position_logprobs(found: TokenLogprobs, tokenizer: Tokenizer | None) -> PositionLogprobs:
    """Log-probabilities at one position, from a rank's."""
    return {
        token_id: Logprob(logprob, rank, None if tokenizer is None else tokenizer.token_text(token_id))
        for token_id, logprob, rank in zip(found.token_ids, found.logprobs, found.ranks, strict=True)
    }


def add_prompt_logprobs(request: Request, found: PromptLogprobs, tokenizer: Tokenizer | None) -> None:
    """Keep the log-probabilities of a chunk's prompt tokens, except for those that are already known."""
    assert request.prompt_logprobs is not None
    num_known = len(request.prompt_logprobs) - found.start - 1  # a preempted prompt is prefilled again
    assert num_known >= 0
    request.prompt_logprobs += [position_logprobs(entry, tokenizer) for entry in found.entries[num_known:]]
