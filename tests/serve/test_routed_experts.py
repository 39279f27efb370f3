"""Routed experts in all kinds of answers."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from moe_runtime.serve.engine_messages import AddRequest
from moe_runtime.serve.generate import GenerateRequest, NativeReply
from moe_runtime.serve.openai.chat_reply import ChatReply
from moe_runtime.serve.openai.chat_request import ChatCompletionRequest
from moe_runtime.serve.openai.completions import CompletionReply, CompletionRequest
from moe_runtime.text.formats.registry import choose_format
from moe_runtime.types.expert_policy import parse_expert_policy
from moe_runtime.types.outputs import Completion, OutputDelta
from moe_runtime.types.sampling_params import SamplingParams


def deltas(experts: np.ndarray | None) -> list[OutputDelta]:
    first = OutputDelta("r", "a", [5], None, None, None, 3, 1)
    return [first, OutputDelta("r", "b", [6], None, "length", None, 3, 2, routed_experts=experts)]


def completion_reply() -> CompletionReply:
    body = CompletionRequest(prompt=[1, 2, 3])
    return CompletionReply("r", "m", body, [AddRequest("r", [1, 2, 3], SamplingParams())], [""], None)


def chat_reply() -> ChatReply:
    body = ChatCompletionRequest(messages=[{"role": "user", "content": "a"}])
    parser = choose_format("", None, ()).parser("", [], calls=False, num_earlier_calls=0, new_id=str)
    return ChatReply("r", "m", body, [AddRequest("r", [1, 2, 3], SamplingParams())], [parser], None)


REPLIES = [lambda: NativeReply("r"), completion_reply, chat_reply]


@pytest.mark.parametrize("make", REPLIES, ids=["native", "completion", "chat"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_the_last_token_brings_them(make, dtype):
    reply = make()
    experts = np.random.default_rng().integers(0, 200, (4, 3, 2)).astype(dtype)
    done = Completion()
    streamed = []
    for delta in deltas(experts):
        done.add(delta)
        streamed += reply.events(delta)
    parts = [part["choices"][0] if "choices" in part else part for part in (*streamed, make().whole([done]))]
    assert ["routed_experts" in part for part in parts] == [False, True, True]
    for part in parts[1:]:
        found = part["routed_experts"]
        array = np.frombuffer(base64.b64decode(found["data"]), found["dtype"]).reshape(found["shape"])
        assert array.dtype == dtype
        assert np.array_equal(array, experts)


@pytest.mark.parametrize("make", REPLIES, ids=["native", "completion", "chat"])
def test_they_are_left_out_where_nobody_asked(make):
    reply = make()
    done = Completion()
    for delta in deltas(None):
        done.add(delta)
        assert "routed_experts" not in str(list(reply.events(delta)))
    assert "routed_experts" not in str(make().whole([done]))


@pytest.mark.parametrize(
    ("routing", "meant"),
    [("fast", "fast"), ({"top_k": 3}, {"top_k": 3}), ({"threshold": [0.5, 1]}, {"threshold": [0.5, 1.0]})],
)
def test_policies_in_bodies(routing, meant):
    body = GenerateRequest.model_validate({"prompt": "x", "routing": routing})
    assert body.sampling_params({}).routing == parse_expert_policy(meant)


def test_a_wrong_policy_names_its_field():
    body = GenerateRequest.model_validate({"prompt": "x", "routing": {"top_p": 2}})
    with pytest.raises(ValueError, match=r"routing\.top_p: 2\.0 is not allowed; it must be a number above 0"):
        body.sampling_params({})
