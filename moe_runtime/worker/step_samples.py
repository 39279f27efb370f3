"""After a step's layers: sampling the sequences' tokens, and log-probabilities of prompts.

Shape suffixes: T tokens, D hidden, B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from moe_runtime.grammars.matcher import Matcher
from moe_runtime.layers.decoder import Decoder
from moe_runtime.wire.messages import PromptLogprobs, Sample, TokenLogprobs
from moe_runtime.worker.rank_step import PreparedStep, Sequence
from moe_runtime.worker.sampler import SamplingRow, sample, token_logprobs

PROMPT_LOGPROB_ROWS = 256  # rows of logits at a time, so that long prompts do not take gigabytes


def sample_step(
    step: PreparedStep,
    hidden_TD: Tensor,
    model: Decoder,
    argmax: Callable[[Tensor], list[int]],
    eos_token_ids: Collection[int],
) -> list[Sample]:
    """Sample a token for every chunk that asks for one, and append it to the chunk's sequence.

    A sequence whose logits are not finite gets token 0: the front ends its request, but may have planned a next row.
    """
    last: list[int] = []  # rows after which to sample
    seq_ids: list[int] = []
    sequences: list[Sequence] = []
    end = 0
    for chunk, sequence in zip(step.work.chunks, step.sequences, strict=True):
        end += chunk.num_tokens
        if chunk.sample:
            last.append(end - 1)
            seq_ids.append(chunk.seq_id)
            sequences.append(sequence)
    if not last:
        return []
    # A step of only decode rows samples every row.
    logits_BV = model.logits(hidden_TD if len(last) == end else hidden_TD[torch.tensor(last, device=hidden_TD.device)])
    rows = [
        SamplingRow(s.params, s.seed, s.token_ids, s.num_prompt_tokens, s.matcher.allowed() if s.matcher else None)
        for s in sequences
    ]
    tokens = sample(logits_BV, rows, argmax, eos_token_ids)
    logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
    for num_best in {row.params.logprobs for row in rows} - {None}:
        which = [index for index, row in enumerate(rows) if row.params.logprobs == num_best and tokens[index] >= 0]
        found = token_logprobs(logits_BV[which], [tokens[index] for index in which], num_best or 0)
        for index, entry in zip(which, found, strict=True):
            logprobs[index] = entry
    for sequence, token in zip(sequences, tokens, strict=True):
        sequence.token_ids.append(max(token, 0))
    errors = [_follow(sequence.matcher, token) for sequence, token in zip(sequences, tokens, strict=True)]
    return [Sample(*sampled) for sampled in zip(seq_ids, tokens, logprobs, errors, strict=True)]


def look_ahead(step: PreparedStep) -> None:
    """Find the tokens that grammars allow after a step's rows, while its layers run."""
    for chunk, sequence in zip(step.work.chunks, step.sequences, strict=True):
        if chunk.sample and sequence.matcher is not None:
            sequence.matcher.look_ahead()


def _follow(matcher: Matcher | None, token: int) -> str:
    """Take a token in a grammar. Returns what is wrong with the grammar."""
    if matcher is None:
        return ""
    error = matcher.error  # of looking ahead: the token means nothing then
    if not error and token >= 0:
        matcher.accept(token)
        error = matcher.error
    return error


def find_prompt_logprobs(step: PreparedStep, hidden_TD: Tensor, model: Decoder) -> list[PromptLogprobs]:
    """Log-probabilities of the prompt tokens of the chunks whose sequences ask for them."""
    found, row = [], 0
    for chunk, sequence in zip(step.work.chunks, step.sequences, strict=True):
        num_best = sequence.params.prompt_logprobs
        known = sequence.token_ids[chunk.start + 1 : sequence.num_prompt_tokens][: chunk.num_tokens]
        if num_best is not None and known:
            entries: list[TokenLogprobs] = []
            for first in range(0, len(known), PROMPT_LOGPROB_ROWS):
                part = known[first : first + PROMPT_LOGPROB_ROWS]
                logits = model.logits(hidden_TD[row + first : row + first + len(part)])
                entries += token_logprobs(logits, part, num_best)
            found.append(PromptLogprobs(chunk.seq_id, chunk.start, entries))
        row += chunk.num_tokens
    return found
