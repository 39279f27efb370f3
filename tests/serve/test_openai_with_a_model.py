"""OpenAI's own client against a server with a real model: its tokens, texts and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from real_server import MAX_MODEL_LEN, RealServer
from serve_fakes import DEADLINE

PAST_THE_END = {"ignore_eos": True}


@pytest.fixture
def client(real: RealServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0, timeout=DEADLINE) as client:
        yield client


def test_greedy_text_and_logprobs_are_the_models(real: RealServer, client: openai.OpenAI) -> None:
    prompt = real.tokenizer.encode("The sea is calm")
    expected = real.greedy(prompt, 8)
    completion = client.completions.create(
        model="tiny", prompt="The sea is calm", max_tokens=8, temperature=0, logprobs=3, extra_body=PAST_THE_END
    )
    (choice,) = completion.choices
    assert choice.text == real.tokenizer.decode(prompt + expected).removeprefix("The sea is calm")
    assert completion.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 8,
        "total_tokens": len(prompt) + 8,
        "prompt_tokens_details": {"cached_tokens": completion.usage.prompt_tokens_details.cached_tokens},
    }
    exact = real.exact_logprobs(prompt + expected)[len(prompt) - 1 :]
    chosen = [float(row[token]) for row, token in zip(exact, expected, strict=False)]
    assert choice.logprobs.token_logprobs == pytest.approx(chosen, abs=1e-3)
    for found, row in zip(choice.logprobs.top_logprobs, exact, strict=False):
        listed = [*row.topk(3).values.tolist(), *chosen]  # tokens with the same text, half a character, have one entry
        assert found and all(min(abs(value - other) for other in listed) < 1e-3 for value in found.values())


def test_a_stream_is_the_whole_in_pieces(real: RealServer, client: openai.OpenAI) -> None:
    options = {"model": "tiny", "max_tokens": 12, "temperature": 0.9, "seed": 5, "extra_body": PAST_THE_END}
    messages = [{"role": "user", "content": "naïve 🙂"}]
    whole = client.chat.completions.create(messages=messages, **options)
    chunks = list(
        client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens and whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
    template = "<|user|>naïve 🙂<|end|><|assistant|>"
    assert whole.usage.prompt_tokens == len(real.tokenizer.encode(template))


def test_a_stop_string_ends_text_and_stream(real: RealServer, client: openai.OpenAI) -> None:
    prompt = real.tokenizer.encode("the story")
    text = real.tokenizer.decode(prompt + real.greedy(prompt, 12)).removeprefix("the story")
    stop = text[2:5]
    options = {"model": "tiny", "prompt": "the story", "max_tokens": 12, "temperature": 0, "stop": [stop]}
    whole = client.completions.create(**options, extra_body=PAST_THE_END).choices[0]
    assert (whole.text, whole.finish_reason) == (text[: text.index(stop)], "stop")
    stream = client.completions.create(**options, extra_body=PAST_THE_END, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.text


def test_requests_at_once_answer_as_alone(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        completion = client.completions.create(
            model="tiny", prompt="x" * (seed + 1), max_tokens=10, seed=seed, extra_body=PAST_THE_END
        )
        return completion.choices[0].text

    alone = [ask(seed) for seed in range(7)]  # more than run together
    with ThreadPoolExecutor(7) as threads:
        assert list(threads.map(ask, range(7))) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": [5] * MAX_MODEL_LEN}, f"prompt: {MAX_MODEL_LEN} tokens, but max_model_len is {MAX_MODEL_LEN}"),
        ({"prompt": [5, 100_000]}, "prompt: token id 100000 is not allowed"),
        ({"prompt": "a", "temperature": -1}, "temperature: -1"),
    ],
)
def test_what_the_engine_refuses_is_the_clients_error(
    client: openai.OpenAI, options: dict[str, object], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(model="tiny", **options)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).usage.completion_tokens == 1
