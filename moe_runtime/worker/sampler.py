"""From logits to tokens. A token is a function of its row's logits, its parameters, its seed and its position.

Shape suffixes: B rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.messages import TokenLogprobs

# Logits stay finite: a penalty beyond these bounds has the same effect as the bound, and so has a temperature.
PENALTIES = 1e-20, 1e20
MAX_TEMPERATURE = 1e30
BARRED = -1e30  # the logit of a token that must not be sampled: its probability is exactly 0


@dataclass(frozen=True)
class SamplingRow:
    """The sampling inputs of one row of logits; the new token's position is `len(token_ids)`.

    `allowed`, bool [tokens of the tokenizer, or a few more], are the tokens that the row's grammar allows; None: all.
    """

    params: SamplingParams
    seed: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    allowed: np.ndarray | None = None


def sample(
    logits_BV: Tensor,
    rows: Sequence[SamplingRow],
    argmax: Callable[[Tensor], list[int]],
    eos_token_ids: Collection[int],
) -> list[int]:
    """One token per row of float32 logits, or -1 for a row with a logit that is NaN or infinite.

    `argmax` is `layers.kit.Kit.argmax`. The bias of logits comes first, then penalties, temperature, min-p, top-k and
    top-p. Each filter renormalises the remaining probabilities, as in vLLM. Equal logits are ordered by token id.
    Before `min_tokens`, no token is sampled that would end the output, unless a row's grammar allows no other.
    """
    logits_BV = _adjust(logits_BV, rows, eos_token_ids)
    tokens = argmax(logits_BV)
    drawn = [index for index, row in enumerate(rows) if not row.params.greedy and tokens[index] >= 0]
    # There are two layouts of the candidates. A row's own parameters choose its layout, not those of other rows.
    for truncated in (False, True):
        which = [index for index in drawn if _truncates(rows[index].params) == truncated]
        if which:
            chosen = _draw(logits_BV[which], [rows[index] for index in which], truncated)
            for index, token in zip(which, chosen, strict=True):
                tokens[index] = token
    return tokens


def token_logprobs(logits_BV: Tensor, tokens: Sequence[int], num_best: int) -> list[TokenLogprobs]:
    """Log-probabilities of the given tokens and of the `num_best` best ones, before penalties and temperature."""
    logprobs_BV = logits_BV.log_softmax(dim=-1)
    chosen_B1 = torch.tensor(tokens, device=logits_BV.device)[:, None]
    chosen_logprob_B1 = logprobs_BV.gather(1, chosen_B1)
    rank_B = (logprobs_BV > chosen_logprob_B1).sum(dim=-1) + 1
    best_BC, best_token_BC = logprobs_BV.topk(num_best, dim=-1)
    columns = (chosen_logprob_B1.flatten(), rank_B, best_BC, best_token_BC)
    return [
        TokenLogprobs([token, *best_tokens], [logprob, *best], [rank, *range(1, num_best + 1)])
        for token, logprob, rank, best, best_tokens in zip(
            tokens, *(column.tolist() for column in columns), strict=True
        )
    ]


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One float64 in [0, 1) for each (seed, position): Philox4x32-10 (Salmon et al. 2011), 53 bits of it."""
    seed, position = np.asarray(seeds, np.uint64), np.asarray(positions, np.uint64)
    word = np.uint64(0xFFFFFFFF)
    bits = np.uint64(32)
    c0, c1, c2, c3 = position & word, position >> bits, np.zeros_like(seed), np.zeros_like(seed)
    k0, k1 = seed & word, seed >> bits
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> bits) ^ c1 ^ k0, p1 & word, (p0 >> bits) ^ c3 ^ k1, p0 & word
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & word, (k1 + np.uint64(0xBB67AE85)) & word
    return ((c0 << bits | c1) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _adjust(logits_BV: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Collection[int]) -> Tensor:
    """The logits with bias, penalties and barred tokens; a copy if any row has one of them."""
    adjusted = logits_BV
    for index, row in enumerate(rows):
        params = row.params
        penalizes = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        barred: Sequence[int] = _barred(row, eos_token_ids, logits_BV.shape[1])
        if not penalizes and not barred and not params.logit_bias and row.allowed is None:
            continue
        if adjusted is logits_BV:
            adjusted = logits_BV.clone()
        logits_V = adjusted[index]
        if params.logit_bias:
            bias_C = torch.tensor(list(params.logit_bias.values()), device=logits_V.device)
            logits_V[torch.tensor(list(params.logit_bias), device=logits_V.device)] += bias_C
        if penalizes:
            _penalize(logits_V, row)
        if row.allowed is not None:
            is_barred = torch.from_numpy(_beyond(row.allowed, barred, len(logits_V)))
            logits_V.masked_fill_(is_barred.to(logits_V.device), BARRED)
        elif barred:
            logits_V[torch.tensor(barred, device=logits_V.device)] = BARRED
    return adjusted


def _barred(row: SamplingRow, eos_token_ids: Collection[int], vocab_size: int) -> list[int]:
    """Tokens that must not be sampled."""
    params = row.params
    if len(row.token_ids) - row.num_prompt_tokens >= params.min_tokens:
        return []
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    return [token for token in ends if token < vocab_size]


def _beyond(allowed: np.ndarray, barred: Sequence[int], vocab_size: int) -> np.ndarray:
    """bool [V]: tokens that a grammar does not allow, and those of `barred`, if that leaves any."""
    is_barred = np.ones(vocab_size, bool)
    known = min(len(allowed), vocab_size)
    is_barred[:known] = ~allowed[:known]
    both = is_barred.copy()
    both[barred] = True
    return is_barred if both.all() else both


def _penalize(logits_V: Tensor, row: SamplingRow) -> None:
    """Apply the penalties of a row in place."""
    params = row.params
    if params.repetition_penalty != 1.0:
        factor = min(max(params.repetition_penalty, PENALTIES[0]), PENALTIES[1])
        seen_C = torch.tensor(sorted(set(row.token_ids)), device=logits_V.device)
        value_C = logits_V[seen_C]
        logits_V[seen_C] = torch.where(value_C > 0, value_C / factor, value_C * factor)
    counts = Counter(row.token_ids[row.num_prompt_tokens :])
    if counts:
        output_C = torch.tensor(list(counts), device=logits_V.device)
        count_C = torch.tensor(list(counts.values()), device=logits_V.device, dtype=logits_V.dtype)
        logits_V[output_C] -= params.presence_penalty + params.frequency_penalty * count_C


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _draw(logits_BV: Tensor, rows: Sequence[SamplingRow], truncated: bool) -> list[int]:
    """Invert each row's cumulative probabilities at its own random number; sorted where they must be truncated."""
    device, params = logits_BV.device, [row.params for row in rows]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.float32)[:, None]

    scaled_BV = logits_BV / column([min(p.temperature, MAX_TEMPERATURE) for p in params])
    token_BC = None
    if truncated:
        scaled_BV, token_BC = scaled_BV.sort(dim=-1, descending=True, stable=True)
        vocab = scaled_BV.shape[1]
        floor_B1 = scaled_BV[:, :1] + column([p.min_p for p in params]).log()
        top_k_B1 = column([p.top_k if p.top_k > 0 else vocab for p in params])
        dropped_BV = (scaled_BV < floor_B1) | (torch.arange(vocab, device=device) >= top_k_B1)
        scaled_BV = scaled_BV.masked_fill(dropped_BV, -torch.inf)
        prob_BV = scaled_BV.softmax(dim=-1, dtype=torch.float64)
        before_BV = prob_BV.cumsum(dim=-1) - prob_BV
        top_p_B1 = column([p.top_p for p in params])
        prob_BV = prob_BV.masked_fill((before_BV >= top_p_B1) & (top_p_B1 < 1.0), 0.0)
    else:
        prob_BV = scaled_BV.softmax(dim=-1, dtype=torch.float64)
    cumulated_BV = prob_BV.cumsum(dim=-1)
    number = uniform([row.seed for row in rows], [len(row.token_ids) for row in rows])
    target_B1 = torch.from_numpy(number).to(device)[:, None] * cumulated_BV[:, -1:]
    index_B1 = torch.searchsorted(cumulated_BV, target_B1, right=True)
    # Rounding may point past the last token with a nonzero probability.
    last_B1 = (cumulated_BV < cumulated_BV[:, -1:]).sum(dim=-1, keepdim=True)
    index_B1 = torch.minimum(index_B1, last_B1)
    chosen: list[int] = (index_B1 if token_BC is None else token_BC.gather(1, index_B1)).flatten().tolist()
    return chosen
