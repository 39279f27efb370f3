"""`/generate` and the status endpoints of a server with a real model."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import pytest
import torch
from real_server import RealServer
from serve_clients import events_of
from serve_fakes import DEADLINE, wait_until


def post(real: RealServer, **body: object) -> httpx.Response:
    return httpx.post(real.url + "/generate", json=body, timeout=DEADLINE)


def metric(real: RealServer, name: str) -> float:
    lines = httpx.get(real.url + "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_tokens_and_prompt_logprobs_are_the_models(real: RealServer) -> None:
    prompt = torch.randint(3, 300, (9,)).tolist()
    body = post(
        real, prompt_token_ids=prompt, max_tokens=6, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    ).json()
    assert body["token_ids"] == real.greedy(prompt, 6) and body["finish_reason"] == "length"
    token_ids = prompt + body["token_ids"]
    exact = real.exact_logprobs(token_ids)
    assert body["prompt_logprobs"][0] is None
    found = [*body["prompt_logprobs"][1:], *body["logprobs"]]
    for entry, token, row in zip(found, token_ids[1:], exact, strict=False):
        assert entry[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=1e-3)
        assert entry[str(token)]["rank"] == 1 + int((row > row[token]).sum())


def test_the_end_of_sequence_ends(real: RealServer) -> None:
    """Whichever token greedy decoding gives third is named as one to stop at."""
    prompt = [40, 41, 42]
    expected = real.greedy(prompt, 8)
    stop = expected[2]
    body = post(real, prompt_token_ids=prompt, max_tokens=8, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    assert body.json()["token_ids"] == expected[: expected.index(stop) + 1]
    assert (body.json()["finish_reason"], body.json()["stop_reason"]) == ("stop", stop)


def test_events_add_up_and_show_the_experts(real: RealServer) -> None:
    body = {"prompt": "The sea", "max_tokens": 7, "seed": 3, "ignore_eos": True, "return_routed_experts": True}
    whole = post(real, **body).json()
    events = events_of(post(real, **body, stream=True).text)[:-1]
    assert "".join(event["text"] for event in events) == whole["text"]
    assert [token for event in events for token in event["token_ids"]] == whole["token_ids"]
    assert events[-1]["usage"] == whole["usage"]
    found = events[-1]["routed_experts"]
    assert found == whole["routed_experts"]
    experts = np.frombuffer(base64.b64decode(found["data"]), found["dtype"]).reshape(found["shape"])
    config = real.model.config
    rows = whole["usage"]["total_tokens"] - 1  # the last token is not run
    assert experts.shape == (rows, config.num_hidden_layers, config.num_experts_per_tok)
    assert experts.max() < config.num_experts
    assert all(len(set(row)) == len(row) for row in experts.reshape(-1, experts.shape[2]).tolist())


def test_a_reader_who_leaves_ends_the_request(real: RealServer) -> None:
    body = {"prompt_token_ids": [5], "max_tokens": 85, "ignore_eos": True, "stream": True}
    before = metric(real, "moe_runtime_generation_tokens_total")
    with httpx.stream("POST", real.url + "/generate", json=body, timeout=DEADLINE) as response:
        next(response.iter_lines())
    wait_until(lambda: metric(real, "moe_runtime_requests_running") == 0, "the request has ended")
    assert metric(real, "moe_runtime_generation_tokens_total") > before
    assert metric(real, "moe_runtime_kv_cache_usage") == 0, "its pages are kept"
    assert post(real, prompt="still there", max_tokens=2, ignore_eos=True).json()["usage"]["completion_tokens"] == 2


def test_load_counts_every_token_of_every_layer(real: RealServer) -> None:
    def tokens() -> np.ndarray:
        return np.array(httpx.get(real.url + "/experts/load").json()["phases"]["prefill"])

    before = tokens()
    assert post(real, prompt_token_ids=[7] * 30, max_tokens=1).status_code == 200
    counted = tokens() - before
    config = real.model.config
    assert counted.shape == (config.num_hidden_layers, config.num_experts)
    assert (counted.sum(axis=1) == 30 * config.num_experts_per_tok).all()


def test_health_names_what_runs(real: RealServer) -> None:
    health = httpx.get(real.url + "/health").json()
    assert health["model"] == "tiny" and health["ep_size"] == 1
