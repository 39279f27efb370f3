import asyncio
import io
import json
import os
import re
import threading

import numpy as np
import pytest
from places import ROOT
from prometheus_client.parser import text_string_to_metric_families
from serve_clients import client_of, run, started
from serve_fakes import RANK_ERROR, FakeEngine, wait_until

from moe_runtime.balancer.load import ExpertLoad
from moe_runtime.balancer.placement import Placement
from moe_runtime.config.engine import EngineConfig
from moe_runtime.serve.async_engine import AsyncEngine


def get(path, fake=None):
    async def scenario():
        async with started(fake) as engine, client_of(engine) as client:
            return await client.get(path)

    return run(scenario())


def test_health_and_ready():
    health = get("/health").json()
    assert (health["status"], health["pid"]) == ("ready", os.getpid())
    assert health["uptime_seconds"] >= 0
    assert {name: health[name] for name in FakeEngine().health()} == FakeEngine().health()
    assert health["dispatcher_steps"] == FakeEngine().stats().dispatcher_steps, "counts are those of now"
    ready = get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


def test_health_and_ready_over_the_life_of_an_engine():
    async def scenario():
        may_load = threading.Event()
        fake = FakeEngine()

        def make_engine():
            assert may_load.wait(10)
            return fake

        engine = AsyncEngine(make_engine)
        engine.start()
        async with client_of(engine) as client:

            async def states():
                answers = [await client.get("/health"), await client.get("/ready"), await client.get("/metrics")]
                return [answer.json()["status"] for answer in answers[:2]], [answer.status_code for answer in answers]

            assert await states() == (["loading", "loading"], [200, 503, 200])
            assert (await client.get("/ready")).json()["reason"] == "the model is loading"
            for method, path in (("POST", "/generate"), ("GET", "/experts/load"), ("GET", "/v1/models")):
                response = await client.request(method, path, json={"prompt": "a"})
                assert response.status_code == 503
                assert response.json()["error"]["message"] == "the model is loading"
            may_load.set()
            await engine.loaded
            assert await states() == (["ready", "ready"], [200, 200, 200])
            await engine.drain(0)
            assert await states() == (["draining", "draining"], [200, 503, 200])
            assert (await client.post("/generate", json={"prompt": "a"})).status_code == 503
            fake.rank_is_dead = True
            await engine.died
            assert await states() == (["dead", "dead"], [503, 503, 200])
            assert RANK_ERROR in (await client.get("/health")).json()["reason"]
            assert (await client.get("/experts/placement")).status_code == 503
        assert await engine.close(5)

    run(scenario())


def metrics_of(text):
    """(name, values of labels by their names without the model's) -> value, of all samples."""
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics():
    async def scenario():
        fake = FakeEngine(allow=threading.Semaphore(9))
        async with started(fake) as engine, client_of(engine) as client:
            for body in ({"prompt": "a bb", "max_tokens": 4}, {"prompt": "a", "stop_token_ids": [4]}):
                assert (await client.post("/generate", json=body)).status_code == 200
            leaving = asyncio.create_task(client.post("/generate", json={"prompt": "a", "max_tokens": None}))
            await asyncio.to_thread(wait_until, lambda: engine.metrics.stats.steps == 9, "nine steps have run")
            leaving.cancel()
            await asyncio.wait([leaving])
            fake.allow.release(1)
            await asyncio.to_thread(wait_until, lambda: fake.aborted, "the request is aborted")
            return await client.get("/metrics")

    response = run(scenario())
    assert response.headers["content-type"].startswith("text/plain")
    metrics = metrics_of(response.text)
    assert all(name[0].startswith("moe_runtime_") for name in metrics)
    expected = {
        ("moe_runtime_num_requests_running",): 0,
        ("moe_runtime_num_requests_waiting",): 0,
        ("moe_runtime_kv_cache_usage_perc",): 0,
        ("moe_runtime_num_preemptions_total",): 3,
        ("moe_runtime_prefix_cache_queries_total",): 100,
        ("moe_runtime_prefix_cache_hits_total",): 60,
        ("moe_runtime_prefix_cache_evictions_total",): 7,
        ("moe_runtime_prompt_tokens_total",): 4,
        ("moe_runtime_steps_total", "all_to_all"): 10,
        ("moe_runtime_generation_tokens_total",): 10,
        ("moe_runtime_request_success_total", "length"): 1,
        ("moe_runtime_request_success_total", "stop"): 1,
        ("moe_runtime_request_success_total", "abort"): 1,
        ("moe_runtime_request_success_total", "error"): 0,
        ("moe_runtime_time_to_first_token_seconds_count",): 3,
        ("moe_runtime_inter_token_latency_seconds_count",): 3 + 2 + 1,
        ("moe_runtime_e2e_request_latency_seconds_count",): 3,
        ("moe_runtime_request_prompt_tokens_count",): 3,
        ("moe_runtime_request_prompt_tokens_sum",): 2 + 1 + 1,
        ("moe_runtime_request_generation_tokens_count",): 3,
        ("moe_runtime_request_queue_time_seconds_count",): 3,
        ("moe_runtime_request_prefill_time_seconds_count",): 3,
        ("moe_runtime_request_decode_time_seconds_count",): 3,
        ("moe_runtime_request_time_per_output_token_seconds_count",): 3,
        # ranks of two experts: layer 1 has all prefill tokens on rank 0, layer 3 has them even
        ("moe_runtime_expert_balancedness", "mean", "prefill"): (0.5 + 1.0) / 2,
        ("moe_runtime_expert_balancedness", "min", "prefill"): 0.5,
        ("moe_runtime_expert_balancedness", "mean", "decode"): (1.0 + 0.5) / 2,
        ("moe_runtime_expert_balancedness", "min", "decode"): 0.5,
    }
    assert {name: metrics[name] for name in expected} == expected


def test_every_sample_names_the_model():
    families = list(text_string_to_metric_families(get("/metrics").text))
    assert len(families) > 20
    for family in families:
        assert family.samples and {sample.labels.get("model_name") for sample in family.samples} == {"fake-model"}


def test_the_metrics_are_those_documented():
    document = (ROOT / "docs" / "http.md").read_text().partition("## GET /metrics")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in document.splitlines() if line.startswith("| `")]
    documented = {}
    for names, kind in rows:
        documented |= dict.fromkeys(re.findall(r"`(\w+)`", names), re.match(r" (\w+)", kind)[1])
    served = {
        family.name.removeprefix("moe_runtime_") + ("_total" if family.type == "counter" else ""): family.type
        for family in text_string_to_metric_families(get("/metrics").text)
        if not family.name.endswith("_created")
    }
    assert documented == served


def test_two_applications_have_metrics_of_their_own():
    async def scenario():
        async with started() as one, started() as other, client_of(one) as client, client_of(other) as idle:
            await client.post("/generate", json={"prompt": "a", "max_tokens": 2})
            return [metrics_of((await each.get("/metrics")).text) for each in (client, idle)]

    busy, idle = run(scenario())
    assert [each["moe_runtime_request_success_total", "length"] for each in (busy, idle)] == [1, 0]


def test_expert_load_and_placement():
    load = get("/experts/load")
    assert ExpertLoad.from_dict(load.json()) == FakeEngine().expert_load()
    placement = get("/experts/placement")
    assert Placement.from_dict(placement.json()) == FakeEngine().placement()


def test_decisions():
    assert get("/experts/decisions").json() == {"decisions": [{"reason": "pays back", "num_moves": 3}]}


def test_rebalance_answers_when_experts_have_moved():
    async def scenario():
        async with started(FakeEngine()) as engine, client_of(engine) as client:
            dry = (await client.post("/experts/rebalance", json={"dry_run": True})).json()
            assert dry["done"] and dry["dry_run"] and dry["balancedness_after"] is None
            first, second = await asyncio.gather(
                *(client.post("/experts/rebalance") for _ in range(2)),
            )
            assert sorted((first.status_code, second.status_code)) == [200, 409]
            done = first if first.status_code == 200 else second
            assert done.json()["balancedness_after"] == 0.9 and done.json()["planned_moves"] == 3
            wrong = await client.post("/experts/rebalance", json={"dry": True})
            assert wrong.status_code == 400

    run(scenario())


@pytest.mark.parametrize("suffix", ["png", "svg", "html", "csv", "json", "npz"])
def test_heatmaps(suffix, tmp_path):
    response = get(f"/experts/heatmap.{suffix}")
    assert response.status_code == 200
    if suffix == "png":
        assert response.headers["content-type"] == "image/png"
        assert response.content.startswith(b"\x89PNG")
    elif suffix == "svg":
        assert response.headers["content-type"] == "image/svg+xml"
        assert b"<svg" in response.content
    elif suffix == "html":
        assert b"<html" in response.content and b"fake-model" in response.content
    elif suffix == "npz":
        assert np.load(io.BytesIO(response.content))["prefill"].sum() == 8
    else:
        path = tmp_path / f"load.{suffix}"
        path.write_bytes(response.content)
        assert ExpertLoad.load(path) == FakeEngine().expert_load()


def test_an_unknown_form_of_heatmap():
    response = get("/experts/heatmap.gif")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "suffix")


def test_the_server_answers_while_a_picture_is_drawn(monkeypatch):
    drawing, may_end = threading.Event(), threading.Event()

    def render(self, suffix):
        drawing.set()
        assert may_end.wait(10)
        return b"picture"

    monkeypatch.setattr(ExpertLoad, "render", render)

    async def scenario():
        async with started() as engine, client_of(engine) as client:
            picture = asyncio.create_task(client.get("/experts/heatmap.png"))
            await asyncio.to_thread(wait_until, drawing.is_set, "the picture is being drawn")
            assert (await client.get("/ready")).status_code == 200
            may_end.set()
            return (await picture).content

    assert run(scenario()) == b"picture"


def test_the_index_page():
    fake = FakeEngine(config=EngineConfig("<script>", ep_size=2))
    page = get("/", fake)
    assert page.headers["content-type"].startswith("text/html")
    assert "&lt;script&gt;" in page.text
    for path in ("/docs", "/health", "/metrics", "/experts/heatmap.svg", "/experts/heatmap.html"):
        assert f'"{path}"' in page.text


def test_the_routes_are_those_documented():
    schema = json.loads(get("/openapi.json").text)
    routes = {(path, method) for path, methods in schema["paths"].items() for method in methods}
    document = (ROOT / "docs" / "http.md").read_text()
    assert all(f"## {method.upper()} {path}\n" in document for path, method in routes)
    assert routes == {
        ("/generate", "post"),
        ("/v1/models", "get"),
        ("/v1/models/{model_id}", "get"),
        ("/tokenize", "post"),
        ("/detokenize", "post"),
        ("/version", "get"),
        ("/v1/completions", "post"),
        ("/v1/chat/completions", "post"),
        ("/health", "get"),
        ("/ready", "get"),
        ("/metrics", "get"),
        ("/experts/load", "get"),
        ("/experts/heatmap.{suffix}", "get"),
        ("/experts/placement", "get"),
        ("/experts/decisions", "get"),
        ("/experts/rebalance", "post"),
        ("/reset_prefix_cache", "post"),
    }
