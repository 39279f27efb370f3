"""The front does little for a request that it refuses: work is counted, not timed."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from serve_clients import client_of, run, started
from serve_fakes import FakeEngine, FakeTokenizer

from moe_runtime.engine.request_rules import RequestRules
from moe_runtime.serve import prompts
from moe_runtime.serve.bodies import Body
from moe_runtime.serve.generate import GenerateRequest
from moe_runtime.serve.openai.chat_request import ChatCompletionRequest
from moe_runtime.serve.openai.completions import CompletionRequest
from moe_runtime.serve.prompts import ClientGoneError, text_source
from moe_runtime.types.sampling_params import SamplingParams

MANY = 100_000
HELLO = [{"role": "user", "content": "hello"}]
WRONG: list[tuple[type[Body], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": [{}] * MANY}),
    (CompletionRequest, {"prompt": [[""]] * MANY}),
    (CompletionRequest, {"prompt": "a", "stop": [5] * MANY}),
    (CompletionRequest, {"prompt": "a", "stop_token_ids": [""] * MANY}),
    (CompletionRequest, {"prompt": "a", "routing": {"top_p": [""] * MANY}}),
    (GenerateRequest, {"prompt_token_ids": [""] * MANY}),
    (GenerateRequest, {"messages": [5] * MANY}),
    (ChatCompletionRequest, {"messages": [{"role": "user"}] * MANY}),
    (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]}),
    (ChatCompletionRequest, {"messages": HELLO, "tools": [{}] * MANY}),
]


@pytest.mark.parametrize(("model", "body"), WRONG)
def test_a_check_ends_at_the_first_wrong_value(model: type[Body], body: dict[str, Any]) -> None:
    """An error for each of a body's 100,000 wrong values took a minute and gigabytes."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 6  # the branches of a union


class CountingTokenizer(FakeTokenizer):
    """A token per character; counts the characters that it tokenises."""

    max_token_bytes = 10

    def __init__(self) -> None:
        super().__init__()
        self.num_chars = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.num_chars += len(text)
        return [1] * len(text)


def rules(max_model_len: int) -> RequestRules:
    return RequestRules(1000, max_model_len, True, SimpleNamespace(resolve=lambda asked: None))  # type: ignore[arg-type]


def encode(
    tokenizer: CountingTokenizer, text: str, rules: RequestRules, params: SamplingParams, gone: threading.Event
) -> list[int]:
    """As a thread does it."""
    made = text_source(tokenizer, text, rules, params, "").make(gone)  # type: ignore[arg-type]
    assert isinstance(made, str)
    return tokenizer.encode(made)


def test_a_text_beyond_every_length_is_not_tokenised() -> None:
    tokenizer = CountingTokenizer()
    with pytest.raises(ValueError, match=r"^prompt: at least 209715 tokens, but max_model_len is 200 "):
        encode(tokenizer, "a" * 2**21, rules(200), SamplingParams(), threading.Event())
    assert tokenizer.num_chars == 0


def test_a_long_text_is_tokenised_until_it_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "PIECE_CHARS", 1000)
    tokenizer = CountingTokenizer()
    with pytest.raises(ValueError, match=r"^prompt: at least \d+ tokens, but max_model_len is 5000 "):
        encode(tokenizer, "a" * 45_000, rules(5000), SamplingParams(), threading.Event())
    assert tokenizer.num_chars <= 6000
    assert len(encode(tokenizer, "a" * 4999, rules(5000), SamplingParams(), threading.Event())) == 4999


def test_work_ends_with_its_client() -> None:
    tokenizer, gone = CountingTokenizer(), threading.Event()
    gone.set()
    with pytest.raises(ClientGoneError):
        encode(tokenizer, "a" * 45_000, rules(5000), SamplingParams(), gone)
    assert tokenizer.num_chars == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a" * 2**21}),
        ("/v1/completions", {"prompt": ["a", "a" * 2**21]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 2**21}]}),
        ("/generate", {"prompt": "a" * 2**21}),
    ],
)
def test_no_route_tokenises_what_cannot_fit(path: str, body: dict[str, Any]) -> None:
    tokenizer = CountingTokenizer()
    threads = []
    tokenizer.encode = lambda *_, **__: threads.append(threading.current_thread()) or [1]  # type: ignore[method-assign]

    async def scenario() -> Any:
        async with started(FakeEngine(tokenizer=tokenizer)) as engine, client_of(engine) as client:
            return await client.post(path, json=body)

    response = run(scenario())
    assert response.status_code == 400 and "max_model_len" in response.json()["error"]["message"]
    assert len(threads) <= 1 and threading.main_thread() not in threads
