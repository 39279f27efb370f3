"""`/v1/completions`: choices, echo, scoring and log-probabilities, over a real model and its tokenizer."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from real_server import MAX_MODEL_LEN, RealServer
from serve_clients import events_of

from moe_runtime.serve.openai.answers import CompletionAnswer

ON = {"ignore_eos": True}


def ask(real: RealServer, **body: Any) -> dict[str, Any]:
    response = httpx.post(real.url + "/v1/completions", json={"temperature": 0, **ON, **body}, timeout=60)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    CompletionAnswer.model_validate(found)
    return found


def stream(real: RealServer, **body: Any) -> list[dict[str, Any]]:
    body = {"temperature": 0, **ON, **body, "stream": True}
    *events, done = events_of(httpx.post(real.url + "/v1/completions", json=body, timeout=60).text)
    assert done == "[DONE]"
    return events


def joined(events: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """The parts of one choice, added up."""
    parts = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    logprobs = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    return {
        "index": index,
        "text": "".join(part["text"] for part in parts),
        "logprobs": {key: [entry for each in logprobs for entry in each[key]] for key in logprobs[0]}
        if logprobs
        else None,
        "finish_reason": parts[-1]["finish_reason"],
        "stop_reason": parts[-1]["stop_reason"],
    }


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_harness_scores_a_text(real: RealServer, as_ids: bool) -> None:
    """As lm-eval does: the whole text is echoed with the log-probability of each token, and nothing is generated."""
    text = "The sea is calm 🦀 tonight"
    token_ids = real.tokenizer.encode(text)
    answer = ask(real, prompt=token_ids if as_ids else text, echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    assert answer["usage"] == {
        "prompt_tokens": len(token_ids),
        "completion_tokens": 0,
        "total_tokens": len(token_ids),
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    exact = real.exact_logprobs(token_ids)
    expected = [float(exact[position - 1][token]) for position, token in enumerate(token_ids)][1:]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
    for found, row in zip(logprobs["top_logprobs"][1:], exact, strict=False):
        assert max(found.values()) == pytest.approx(float(row.max()), abs=1e-3)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert "\ufffd" in token or text[offset:].startswith(token)


def test_a_prompt_as_long_as_the_context_can_be_scored(real: RealServer) -> None:
    prompt = [5] * MAX_MODEL_LEN
    answer = ask(real, prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == MAX_MODEL_LEN


def test_echo_begins_the_text_and_its_logprobs(real: RealServer) -> None:
    prompts = ["The sea", "a 🦀"]
    alone = ask(real, prompt=prompts, max_tokens=4, logprobs=2)
    echoed = ask(real, prompt=prompts, max_tokens=4, logprobs=2, echo=True)
    events = stream(real, prompt=prompts, max_tokens=4, logprobs=2, echo=True)
    for index, prompt in enumerate(prompts):
        plain, choice = alone["choices"][index], echoed["choices"][index]
        assert choice["text"] == prompt + plain["text"]
        assert choice["logprobs"]["token_logprobs"][-4:] == plain["logprobs"]["token_logprobs"]
        assert len(choice["logprobs"]["tokens"]) == len(real.tokenizer.encode(prompt)) + 4
        assert joined(events, index) == choice
    assert echoed["usage"] == alone["usage"]


def test_choices_of_a_prompt(real: RealServer) -> None:
    """Choice 0 has the request's seed, choice i that plus i; a stream has all of them."""
    options = {"prompt": ["the story", "The sea"], "max_tokens": 6, "temperature": 1.0, "logprobs": 1}
    answer = ask(real, **options, n=3, seed=7)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for index, choice in enumerate(answer["choices"]):
        alone = ask(real, **{**options, "prompt": options["prompt"][index // 3]}, seed=7 + index % 3)
        (same,) = alone["choices"]
        assert (same["text"], same["finish_reason"], index) == (
            choice["text"],
            choice["finish_reason"],
            choice["index"],
        )
        values = [each["logprobs"]["token_logprobs"] for each in (same, choice)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)  # with torch, a batch's shape changes rounding
    assert len({choice["text"] for choice in answer["choices"][:3]}) > 1
    num_prompt = sum(len(real.tokenizer.encode(prompt)) for prompt in options["prompt"])
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        num_prompt,
        36,
        num_prompt + 36,
    )
    events = stream(real, **options, n=3, seed=7, stream_options={"include_usage": True})
    assert [joined(events, index) for index in range(6)] == answer["choices"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == usage["total_tokens"]
    cached = events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached <= num_prompt - len(options["prompt"]), "all but the last token of each prompt, at most"


def test_usage_in_every_chunk(real: RealServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = stream(real, prompt="a", max_tokens=3, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3]
    assert last["usage"] == events[-1]["usage"]


@pytest.mark.parametrize("streamed", [False, True])
def test_prompt_logprobs_are_there(real: RealServer, streamed: bool) -> None:
    prompt = real.tokenizer.encode("The sea is")
    exact = real.exact_logprobs(prompt)
    body = {"prompt": prompt, "max_tokens": 2, "prompt_logprobs": 1}
    parts = stream(real, **body) if streamed else [ask(real, **body)]
    choices = [choice for part in parts for choice in part["choices"]]
    assert ["prompt_logprobs" in choice for choice in choices] == [True, False][: len(choices)]
    first, *others = choices[0]["prompt_logprobs"]
    assert first is None
    for position, found in enumerate(others):
        token = prompt[position + 1]
        assert found[str(token)]["logprob"] == pytest.approx(float(exact[position][token]), abs=1e-3)
        assert found[str(token)]["decoded_token"] == real.tokenizer.token_text(token)


def test_bias_decides_and_least_tokens_come(real: RealServer) -> None:
    prompt = real.tokenizer.encode("The sea is")
    (wanted,) = real.tokenizer.encode("q")
    answer = ask(real, prompt=prompt, max_tokens=3, logit_bias={str(wanted): 100})
    assert answer["choices"][0]["text"] == "qqq"
    stop = real.tokenizer.decode(real.greedy(prompt, 3)[2:])
    ids = real.greedy(prompt, 8)
    ended = ask(real, prompt=prompt, max_tokens=8, stop_token_ids=[ids[0]])
    assert ended["usage"]["completion_tokens"] == 1
    longer = ask(real, prompt=prompt, max_tokens=8, stop_token_ids=[ids[0]], min_tokens=4, stop=[stop])
    assert longer["usage"]["completion_tokens"] >= 4


def test_tokens_with_one_text_keep_the_best_and_offsets_are_those_of_the_text(real: RealServer) -> None:
    crab = real.tokenizer.encode("a🦀")[1:]
    assert len(crab) > 1 and {real.tokenizer.token_text(token) for token in crab} == {"\ufffd"}
    answer = ask(real, prompt=real.tokenizer.encode("🦀🦀b🦀"), echo=True, logprobs=20, max_tokens=0)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "🦀🦀b🦀"
    exact = real.exact_logprobs(real.tokenizer.encode("🦀🦀b🦀"))
    for position, found in enumerate(logprobs["top_logprobs"][1:]):
        best: dict[str, float] = {}
        for token in exact[position].topk(20).indices.tolist():
            best.setdefault(real.tokenizer.token_text(token), float(exact[position][token]))
        for text, value in best.items():
            assert found[text] == pytest.approx(value, abs=1e-3)
    offsets = dict(zip(logprobs["text_offset"], logprobs["tokens"], strict=True))
    assert offsets[2] == "b" and logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert set(logprobs["text_offset"]) == {0, 1, 2, 3}


def test_a_rendered_prompt_has_one_beginning(real: RealServer) -> None:
    """The tokenizer of this model adds none; tests/text has one that does."""
    rendered = "<|user|>Hi<|end|><|assistant|>"
    answer = ask(real, prompt=rendered, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == len(real.tokenizer.encode(rendered, add_special_tokens=False))
