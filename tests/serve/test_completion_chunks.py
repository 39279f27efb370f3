"""Replies of `/v1/completions` at any chunking: the parts of a stream add up to the whole."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import save_byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.serve.engine_messages import AddRequest
from moe_runtime.serve.openai.answers import CompletionAnswer
from moe_runtime.serve.openai.completions import CompletionReply, CompletionRequest
from moe_runtime.text.tokenizer import Tokenizer
from moe_runtime.types.outputs import Completion, Logprob, OutputDelta, PositionLogprobs
from moe_runtime.types.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def logprobs_of(tokenizer: Tokenizer, token_id: int) -> PositionLogprobs:
    ids = [token_id, *((token_id * 7 + n) % tokenizer.vocab_size for n in range(3))]
    return {each: Logprob(-0.5 - n, n + 1, tokenizer.token_text(each)) for n, each in enumerate(ids)}


def joined(events: list[dict[str, Any]], index: int) -> dict[str, Any]:
    parts = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    logprobs = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    return {
        "text": "".join(part["text"] for part in parts),
        "logprobs": {key: [entry for each in logprobs for entry in each[key]] for key in logprobs[0]}
        if logprobs
        else None,
        "finish_reason": parts[-1]["finish_reason"],
    }


@settings(deadline=None, max_examples=100)
@given(data=st.data(), n=st.integers(1, 3), echo=st.booleans(), logprobs=st.sampled_from([None, 0, 3]))
def test_any_chunks_add_up_to_the_whole(
    tokenizer: Tokenizer, data: st.DataObject, n: int, echo: bool, logprobs: int | None
) -> None:
    tokens = st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=8)
    prompts = data.draw(st.lists(tokens, min_size=1, max_size=3))
    body = CompletionRequest(prompt=prompts, n=n, echo=echo, logprobs=logprobs, stream_options={"include_usage": True})
    commands = [
        AddRequest(f"r{p * n + i}", prompt, SamplingParams()) for p, prompt in enumerate(prompts) for i in range(n)
    ]
    texts = [tokenizer.decode(prompt) for prompt in prompts]

    def reply() -> CompletionReply:
        return CompletionReply("id", "m", body, commands, texts, tokenizer)

    outputs = [data.draw(tokens) for _ in commands]
    pending = []
    for command, output in zip(commands, outputs, strict=True):
        begin = 0
        while begin < len(output):
            end = data.draw(st.integers(begin + 1, len(output)))
            found = None if logprobs is None else [logprobs_of(tokenizer, token) for token in output[begin:end]]
            prompt = command.prompt if begin == 0 else None
            of_prompt = None
            if prompt is not None and echo and logprobs is not None:
                of_prompt = [None, *(logprobs_of(tokenizer, token) for token in prompt[1:])]
            reason = "length" if end == len(output) else None
            text = tokenizer.decode(output[begin:end])
            delta = (command.request_id, text, output[begin:end], found, reason, None, len(command.prompt), end)
            pending.append(OutputDelta(*delta, prompt_token_ids=prompt, prompt_logprobs=of_prompt))
            begin = end
    order = data.draw(st.permutations(sorted({delta.request_id for delta in pending})))
    pending.sort(key=lambda delta: (delta.num_output_tokens, order.index(delta.request_id)))
    completions = {command.request_id: Completion() for command in commands}
    streamed, events = reply(), []
    for delta in pending:
        completions[delta.request_id].add(delta)
        events += streamed.events(delta)
    events += streamed.last_events()
    whole = reply().whole([completions[command.request_id] for command in commands])
    CompletionAnswer.model_validate(whole)
    for index, choice in enumerate(whole["choices"]):
        assert joined(events, index) == {key: choice[key] for key in ("text", "logprobs", "finish_reason")}
    assert events[-1]["usage"] == whole["usage"]
    assert whole["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert whole["usage"]["completion_tokens"] == sum(map(len, outputs))
    if logprobs is not None:
        for choice in whole["choices"]:
            offsets = choice["logprobs"]["text_offset"]
            assert offsets == sorted(offsets) and offsets[0] == 0
