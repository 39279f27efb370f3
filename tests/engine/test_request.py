from __future__ import annotations

import pytest

from moe_runtime.engine.request import Request
from moe_runtime.text.detokenizer import IncrementalDecoder, OutputText
from moe_runtime.types.sampling_params import SamplingParams

EOS = 9


def make_request(max_output_tokens: int = 3, **params) -> Request:
    return Request(
        request_id="a",
        seq_id=0,
        token_ids=[1, 2, 3, 4, 5],
        num_prompt_tokens=5,
        params=SamplingParams(**params),
        seed=0,
        max_output_tokens=max_output_tokens,
    )


def plan(request: Request, num_tokens: int) -> None:
    request.num_planned += num_tokens
    request.num_pending += request.num_planned == request.num_future_tokens


def test_counts_run_ahead_of_results_and_end_with_the_length():
    request = make_request(max_output_tokens=3)
    request.num_prefill_tokens = 5
    assert (request.num_unplanned, request.is_decoding) == (5, False)
    plan(request, 3)
    assert (request.num_unplanned, request.is_decoding, request.num_pending) == (2, False, 0)
    plan(request, 2)
    assert (request.num_unplanned, request.is_decoding, request.num_pending) == (1, True, 1)
    plan(request, 1)
    assert (request.num_unplanned, request.num_pending) == (1, 2)
    assert request.append(7, [EOS]) == (None, None)
    plan(request, 1)
    assert (request.num_unplanned, request.num_pending, request.num_output_tokens) == (0, 2, 1)
    assert request.append(7, [EOS]) == (None, None)
    assert request.append(7, [EOS]) == ("length", None)
    with pytest.raises(AssertionError):
        request.append(7, [EOS])


@pytest.mark.parametrize(
    ("params", "token", "expected"),
    [
        ({}, EOS, ("stop", None)),
        ({}, 8, (None, None)),
        ({"ignore_eos": True}, EOS, (None, None)),
        ({"stop_token_ids": [8]}, 8, ("stop", 8)),
        ({"stop_token_ids": [EOS]}, EOS, ("stop", None)),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, EOS, ("stop", EOS)),
        ({"stop_token_ids": [10**6]}, 8, (None, None)),
    ],
)
def test_what_ends_a_request(params, token, expected):
    request = make_request(**params)
    request.num_pending = 1
    assert request.append(token, [EOS]) == expected
    assert request.token_ids[-1] == token


def test_a_stop_wins_over_the_length_and_a_string_over_both():
    request = make_request(max_output_tokens=1)
    request.num_pending = 1
    assert request.append(EOS, [EOS]) == ("stop", None)

    request = make_request(max_output_tokens=1, stop=["5"])
    request.output_text = OutputText(IncrementalDecoder(lambda ids: "".join(map(str, ids)), []), ("5",), False)
    request.num_pending = 1
    assert request.append(5, [EOS]) == ("stop", "5")


def test_the_token_that_ends_it_gives_text_only_if_asked_for():
    for include, text in ((False, "7"), (True, "78")):
        request = make_request(stop_token_ids=[8], include_stop_str_in_output=include)
        request.output_text = OutputText(IncrementalDecoder(lambda ids: "".join(map(str, ids)), []), (), include)
        request.num_pending = 2
        request.append(7, [])
        assert request.append(8, []) == ("stop", 8)
        delta = request.delta([8], None, "stop", 8)
        assert delta.text == text
        assert (delta.num_prompt_tokens, delta.num_output_tokens) == (5, 2)


def test_the_first_delta_brings_the_prompt():
    request = make_request()
    request.num_pending = 2
    request.append(7, [EOS])
    assert request.delta([7], None, None, None).prompt_token_ids == [1, 2, 3, 4, 5]
    request.append(7, [EOS])
    assert request.delta([7], None, None, None).prompt_token_ids is None
