"""Expert changes by capacity and by load: in `usage` on every endpoint, and in the metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from serve_clients import client_of, events_of, run, started
from serve_fakes import FakeEngine
from tiny_models import VOCAB, make_model, save

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.types.outputs import ExpertChanges

CHANGES = ExpertChanges(moved=3, rerouted=0, dropped=7)
SHOWN = {"moved": 3, "rerouted": 0, "dropped": 7}
TWICE = {"moved": 6, "rerouted": 0, "dropped": 14}
HELLO = [{"role": "user", "content": "hello there"}]


def post(path: str, body: dict[str, Any], changes: ExpertChanges | None) -> Any:
    async def scenario() -> Any:
        async with started(FakeEngine(expert_changes=changes)) as engine, client_of(engine) as client:
            return await client.post(path, json=body)

    response = run(scenario())
    assert response.status_code == 200
    return response


ROUTES = [
    ("/generate", {"prompt": "a bb"}, SHOWN),
    ("/v1/completions", {"prompt": "a bb"}, SHOWN),
    ("/v1/completions", {"prompt": ["a bb", "c"]}, TWICE),
    ("/v1/chat/completions", {"messages": HELLO}, SHOWN),
]


@pytest.mark.parametrize(("path", "body", "shown"), ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_usage_has_them(path: str, body: dict[str, Any], shown: dict[str, int], stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream and "/v1" in path else {}
    options |= {"stream": stream}
    for changes, expected in ((CHANGES, shown), (None, None)):
        response = post(path, {**body, **options, "max_tokens": 2}, changes)
        last = events_of(response.text)[-2] if stream else response.json()
        assert last["usage"].get("expert_changes") == expected
        assert last["usage"]["total_tokens"] > 0


def metrics_of(text: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(text)
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name != "model_name")): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_have_them() -> None:
    async def scenario() -> str:
        async with started(FakeEngine(expert_changes=CHANGES)) as engine, client_of(engine) as client:
            await client.post("/generate", json={"prompt": "a"})
            return (await client.get("/metrics")).text

    metrics = metrics_of(run(scenario()))
    assert {change: metrics["moe_runtime_expert_changes_total", change] for change in SHOWN} == SHOWN
    assert metrics["moe_runtime_dispatch_extra_rounds_total",] == 5


@pytest.mark.parametrize(
    "options", [{"capacity_factor": 0.6, "overflow": "drop"}, {"capacity_factor": 0.6, "overflow": "queue"}, {}]
)
def test_a_model_behind_http(tmp_path: Path, options: dict[str, Any]) -> None:
    save(make_model("qwen3"), tmp_path)
    config = EngineConfig(str(tmp_path), device="cpu", skip_tokenizer_init=True, **options)

    async def scenario(make: Callable[[], Any]) -> Any:
        engine = AsyncEngine(make)
        engine.start()
        await engine.loaded
        try:
            async with client_of(engine) as client:
                prompt = torch.randint(2, VOCAB, (40,)).tolist()
                body = {"prompt_token_ids": prompt, "max_tokens": 3, "ignore_eos": True}
                answer = (await client.post("/generate", json=body)).json()
                return answer, (await client.get("/metrics")).text, (await client.get("/health")).json()
        finally:
            assert await engine.close(20)

    answer, text, health = run(scenario(lambda: build_engine(config)))
    metrics = metrics_of(text)
    dropped = metrics["moe_runtime_expert_changes_total", "dropped"]
    rounds = metrics["moe_runtime_dispatch_extra_rounds_total",]
    if options.get("overflow") == "drop":
        assert answer["usage"]["expert_changes"] == {"moved": 0, "rerouted": 0, "dropped": dropped}
        assert dropped > 0 and rounds == 0
        assert health["placement_invariance"] == "none"
    else:
        assert "expert_changes" not in answer["usage"]
        assert dropped == 0 and (rounds > 0) == bool(options)
        assert health["placement_invariance"] != "none"
