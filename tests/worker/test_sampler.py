"""The sampler against slow references: random numbers, penalties, truncation, the distribution, log-probabilities."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.kernels import torch_ops
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.worker import sampler
from moe_runtime.worker.sampler import SamplingRow, token_logprobs, uniform

VOCAB = 53
EOS = (3, 11)


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    return sampler.sample(logits, rows, torch_ops.argmax, EOS)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10, word by word."""
    for _ in range(10):
        p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (p1 >> 32) ^ counter[1] ^ key[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ counter[3] ^ key[1],
            p0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_philox_known_answers() -> None:
    """The vectors published with Random123."""
    ones = 0xFFFFFFFF
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**40)), min_size=1, max_size=5))
def test_uniform_is_philox_of_seed_and_position(pairs: list[tuple[int, int]]) -> None:
    found = uniform([seed for seed, _ in pairs], [position for _, position in pairs])
    for number, (seed, position) in zip(found, pairs, strict=True):
        words = philox([position & 0xFFFFFFFF, position >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
        assert number == ((words[0] << 32 | words[1]) >> 11) / 2**53


def slow_probabilities(logits: np.ndarray, row: SamplingRow) -> np.ndarray:
    """What the parameters make of one row of logits, token by token."""
    p = row.params
    logits = logits.astype(np.float64).copy()
    for token, bias in (p.logit_bias or {}).items():
        logits[token] += bias
    for token in set(row.token_ids):
        logits[token] = (
            logits[token] / p.repetition_penalty if logits[token] > 0 else logits[token] * p.repetition_penalty
        )
    for token, count in Counter(row.token_ids[row.num_prompt_tokens :]).items():
        logits[token] -= p.presence_penalty + p.frequency_penalty * count
    if len(row.token_ids) - row.num_prompt_tokens < p.min_tokens:
        logits[[*p.stop_token_ids, *([] if p.ignore_eos else EOS)]] = -1e30
    if p.greedy:
        return np.eye(VOCAB)[logits.argmax()]
    order = np.argsort(-logits, kind="stable")
    weight = np.exp((logits - logits.max()) / p.temperature)
    kept = [t for i, t in enumerate(order) if weight[t] >= p.min_p * weight.max() and (p.top_k <= 0 or i < p.top_k)]
    total, nucleus, mass = weight[kept].sum(), [], 0.0
    for token in kept:
        if p.top_p < 1.0 and mass >= p.top_p:
            break
        nucleus.append(token)
        mass += weight[token] / total
    out = np.zeros(VOCAB)
    out[nucleus] = weight[nucleus] / weight[nucleus].sum()
    return out


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([-1, 0, 1, 4, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([None, {3: 100.0}, {5: -100.0, 6: 2.5}, {11: 50.0, 20: 50.0}]),
    min_tokens=st.sampled_from([0, 1, 5]),
    stop_token_ids=st.sampled_from([(), (20,)]),
    ignore_eos=st.booleans(),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(params, st.integers(0, 2**63 - 1)), min_size=1, max_size=5), st.randoms(use_true_random=True))
def test_tokens_have_probability_and_rows_do_not_mix(rows_drawn: list, rng) -> None:
    torch.manual_seed(rng.getrandbits(32))
    logits = torch.randn(len(rows_drawn), VOCAB) * 3
    rows = []
    for p, seed in rows_drawn:
        tokens = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
        rows.append(SamplingRow(p, seed, tokens, rng.randrange(1, len(tokens) + 1)))
    before = logits.clone()
    chosen = sample(logits, rows)
    assert torch.equal(logits, before)
    for index, (token, row) in enumerate(zip(chosen, rows, strict=True)):
        probabilities = slow_probabilities(logits[index].numpy(), row)
        assert probabilities[token] > 0
        assert sample(logits[index : index + 1], [row]) == [token]
        if row.params.greedy:
            assert token == probabilities.argmax()


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=6),
        SamplingParams(temperature=1.5, top_p=0.8, min_p=0.02, repetition_penalty=1.4, presence_penalty=0.5),
    ],
    ids=["plain", "top_k", "mixed"],
)
def test_frequencies_follow_the_probabilities(p: SamplingParams) -> None:
    """Chi-square of 20,000 draws: fails by chance about once in ten thousand runs."""
    draws = 20_000
    logits = torch.randn(VOCAB) * 1.5
    tokens = torch.randint(VOCAB, (9,)).tolist()
    start = int(torch.randint(2**40, ()))
    rows = [SamplingRow(p, start + i, tokens, 4) for i in range(draws)]
    found = np.bincount(sample(logits.expand(draws, -1), rows), minlength=VOCAB)
    expected = slow_probabilities(logits.numpy(), rows[0]) * draws
    assert (found[expected == 0] == 0).all()
    likely = expected >= 5
    degrees = max(int(likely.sum()) - 1, 1)
    chi2 = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi2 < degrees + 4 * np.sqrt(2 * degrees) + 8


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(temperature=temperature, repetition_penalty=repetition, top_p=top_p, min_tokens=min_tokens)
        for temperature in (0.0, 1e-40, 1e-5, 1.0, 1e300)
        for repetition in (1e-300, 1e-30, 1.0, 1e30, 1e300)
        for top_p in (1.0, 0.5)
        for min_tokens in (0, 9)
    ],
)
def test_extreme_parameters_give_a_token_of_the_right_side(p: SamplingParams) -> None:
    """A tiny penalty makes a seen token with a positive logit certain; a huge one makes it impossible."""
    logits = torch.randn(1, VOCAB) + 3.0
    logits[0, 4:7] = torch.tensor([2.0, 0.0, -1.0])
    (token,) = sample(logits, [SamplingRow(p, 1, [4, 5, 6], 3)])
    assert 0 <= token < VOCAB
    if p.temperature <= 1.0:
        if p.repetition_penalty < 1:
            assert token == 4
        elif p.repetition_penalty > 1:
            assert token != 4
        elif p.temperature < 1.0:
            allowed = logits[0].clone()
            if p.min_tokens:
                allowed[list(EOS)] = -torch.inf
            assert token == allowed.argmax()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_no_token_and_the_others_theirs(bad: float) -> None:
    logits = torch.randn(3, VOCAB)
    rows = [SamplingRow(SamplingParams(temperature=t, top_p=0.9), 7, [1, 2], 1) for t in (0.0, 1.0, 1.0)]
    expected = sample(logits, rows)
    for index in range(3):
        broken = logits.clone()
        broken[index, int(torch.randint(VOCAB, ()))] = bad
        assert sample(broken, rows) == [-1 if row == index else token for row, token in enumerate(expected)]


def test_positions_of_one_seed_differ() -> None:
    logits = torch.zeros(1, VOCAB)
    tokens = [sample(logits, [SamplingRow(SamplingParams(), 7, [0] * n, 1)])[0] for n in range(1, 60)]
    assert len(set(tokens)) > 20


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(4, VOCAB)
    tokens = torch.randint(VOCAB, (4,)).tolist()
    exact = logits.double().log_softmax(-1)
    for num_best in (0, 3):
        for row, (entry, token) in enumerate(zip(token_logprobs(logits, tokens, num_best), tokens, strict=True)):
            order = exact[row].argsort(descending=True).tolist()
            assert entry.token_ids == [token, *order[:num_best]]
            assert entry.ranks == [order.index(token) + 1, *range(1, num_best + 1)]
            wanted = exact[row, entry.token_ids]
            torch.testing.assert_close(torch.tensor(entry.logprobs).double(), wanted, atol=1e-5, rtol=1e-5)
