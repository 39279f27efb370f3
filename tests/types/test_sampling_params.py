from __future__ import annotations

import dataclasses
import math

import msgspec
import pytest

from moe_runtime.types.sampling_params import MAX_INTEGER, SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (16, 1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.seed, params.stop, params.stop_token_ids, params.ignore_eos) == (None, (), (), False)
    assert (params.logprobs, params.prompt_logprobs, params.skip_special_tokens) == (None, None, True)


BAD = [
    ("n", [0, -1, 1.5, None, True]),
    ("max_tokens", [-1, 1.5, True, "4", 2**63]),
    ("min_tokens", [-1, 17, 1.0, None]),
    ("logit_bias", [5, [1], {"5": 1}, {-1: 1}, {3: 100.5}, {3: math.nan}, {3: "1"}, {True: 1}]),
    ("temperature", [-0.1, math.nan, math.inf, None, "1", True, 10**400]),
    ("top_p", [0, -1, 1.01, math.nan, None, 10**400]),
    ("top_k", [-2, 1.5, None, True, 2**63]),
    ("min_p", [-0.1, 1.1, math.nan]),
    ("repetition_penalty", [0, -1, math.inf]),
    ("presence_penalty", [-2.1, 2.1, math.nan]),
    ("frequency_penalty", [-2.1, 2.1, None]),
    ("seed", [-2, 1.0, True, 2**63]),
    ("stop", [5, "", ["a", ""], [1], b"ab", {"a": 1}, ["\ud800"]]),
    ("stop_token_ids", [5, "12", [-1], [1.5], [None], [True], [2**63]]),
    ("ignore_eos", [1, None, "yes"]),
    ("logprobs", [-1, 21, True]),
    ("prompt_logprobs", [-1, 21, 0.5]),
    ("skip_special_tokens", [0]),
    ("include_stop_str_in_output", ["no"]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_a_wrong_value_gets_one_line_that_names_the_field(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: [^\n]* is not allowed; [^\n]*must be [^\n]+$"):
        SamplingParams(**{name: value})


def test_the_message_is_clear():
    with pytest.raises(ValueError, match=r"^top_p: 1\.5 is not allowed; it must be a number above 0 and at most 1$"):
        SamplingParams(top_p=1.5)
    with pytest.raises(ValueError, match=r"^temperature: -1 is not allowed; it must be a number at least 0$"):
        SamplingParams(temperature=-1)
    with pytest.raises(ValueError, match=r"^logprobs: 21 is not allowed; it must be an integer from 0 to 20$"):
        SamplingParams(logprobs=21)


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": None, "seed": MAX_INTEGER, "top_k": -1, "logprobs": 0, "prompt_logprobs": 20},
        {"temperature": 0, "top_p": 1, "min_p": 1, "presence_penalty": -2, "frequency_penalty": 2},
        {"stop": "end", "stop_token_ids": [0, 5]},
        {"stop": ["a", "b"], "stop_token_ids": None},
        {"stop": None, "repetition_penalty": 10**300},
        {"n": 3, "max_tokens": 0, "logit_bias": {0: 1, 7: -100}, "seed": 4},
        {"max_tokens": None, "min_tokens": 2**40, "logit_bias": {}},
    ],
)
def test_good_values_are_normalised_and_survive_the_wire(values):
    params = SamplingParams(**values)
    assert isinstance(params.stop, tuple) and isinstance(params.stop_token_ids, tuple)
    assert isinstance(params.temperature, float) and isinstance(params.repetition_penalty, float)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_minus_one_draws_a_seed():
    assert SamplingParams(seed=-1).seed is None


def test_a_choice_has_a_seed_of_its_own_and_the_first_the_prompts_logprobs():
    params = SamplingParams(n=3, seed=MAX_INTEGER - 1, prompt_logprobs=2, top_k=4)
    choices = [params.choice(index) for index in range(3)]
    assert [choice.seed for choice in choices] == [MAX_INTEGER - 1, MAX_INTEGER, 0]
    assert [choice.prompt_logprobs for choice in choices] == [2, None, None]
    assert {(choice.n, choice.top_k) for choice in choices} == {(1, 4)}
    assert SamplingParams(n=2).choice(1).seed is None
    alone = SamplingParams(seed=5)
    assert alone.choice(0) is alone


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-45, 1e-40, 1e-38, 9e-6])
def test_a_temperature_that_float32_cannot_divide_by_is_greedy(temperature):
    assert SamplingParams(temperature=temperature).greedy


def test_frozen_and_greedy():
    params = SamplingParams(temperature=0)
    assert params.greedy and not SamplingParams().greedy
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3
