"""Prometheus metrics of the server, in a separate registry. Names follow vLLM's if it has the same metric."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from moe_runtime.balancer.load import ExpertLoad
    from moe_runtime.engine.stats import EngineStats

TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
FINISH_REASONS = ("stop", "length", "abort", "error")


class Metrics(Collector):
    """All metrics of one server.

    Attributes:
        stats: the engine's figures after its last step, read at every scrape; None while the model loads.
    """

    def __init__(self) -> None:
        self.stats: EngineStats | None = None
        self.registry = CollectorRegistry()
        self.time_to_first_token = Histogram(
            "moe_runtime_time_to_first_token_seconds",
            "Time from a request's arrival to its first token",
            buckets=TTFT_BUCKETS,
            registry=self.registry,
        )
        self.inter_token_latency = Histogram(
            "moe_runtime_inter_token_latency_seconds",
            "Time between two tokens of a request",
            buckets=ITL_BUCKETS,
            registry=self.registry,
        )
        self.e2e_latency = Histogram(
            "moe_runtime_e2e_request_latency_seconds",
            "Time from a request's arrival to its end",
            buckets=E2E_BUCKETS,
            registry=self.registry,
        )
        self.requests = Counter(
            "moe_runtime_request_success",
            "Requests that have ended, by reason",
            ["finished_reason"],
            registry=self.registry,
        )
        for reason in FINISH_REASONS:
            self.requests.labels(reason)
        self._balancedness = Gauge(
            "moe_runtime_expert_balancedness",
            "Mean rank load / max rank load since the start (1 is perfect), as mean and min over layers",
            ["phase", "over_layers"],
            registry=self.registry,
        )
        self.registry.register(self)

    def start_timer(self) -> RequestTimer:
        """A timer for a request that arrives now."""
        return RequestTimer(self)

    def set_expert_load(self, load: ExpertLoad) -> None:
        """Update the gauges of balancedness."""
        for phase in load.tokens:
            balancedness_L = load.balancedness(phase)
            self._balancedness.labels(phase, "mean").set(float(balancedness_L.mean()))
            self._balancedness.labels(phase, "min").set(float(balancedness_L.min()))

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        stats = self.stats
        if stats is None:
            return
        yield _gauge("num_requests_running", "Requests that are running", stats.num_running)
        yield _gauge("num_requests_waiting", "Requests waiting to be admitted", stats.num_waiting)
        yield _gauge("kv_cache_usage_perc", "Share of KV cache pages in use, 0 to 1", stats.kv_cache_usage)
        yield _counter("num_preemptions", "Requests preempted because pages ran out", stats.num_preemptions)
        yield _counter("prompt_tokens", "Prompt tokens that went through the model", stats.prompt_tokens)
        yield _counter("generation_tokens", "Tokens generated", stats.generation_tokens)
        steps = CounterMetricFamily("moe_runtime_steps", "Engine steps, by dispatcher", labels=["dispatcher"])
        for dispatcher, count in stats.dispatcher_steps.items():
            steps.add_metric([dispatcher], count)
        yield steps
        changes = CounterMetricFamily(
            "moe_runtime_expert_changes",
            "Assignments of tokens to experts changed by capacity limits and balance_epsilon",
            labels=["change"],
        )
        for change, count in asdict(stats.expert_changes).items():
            changes.add_metric([change], count)
        yield changes
        yield _counter("dispatch_extra_rounds", "Dispatch rounds beyond one per layer", stats.extra_rounds)
        balancer = stats.balancer
        yield _gauge("placement_version", "Changes of the placement since the start", balancer.placement_version)
        yield _gauge("expert_balancedness_recent", "Mean rank load / max rank load, recent", balancer.balancedness)
        yield _gauge("expert_balancedness_slow", "The same for the slow average of load", balancer.balancedness_slow)
        yield _gauge("expert_migration_running", "1 while experts move", balancer.is_migrating)
        yield _counter("expert_moves", "Experts copied to another slot", balancer.moves)
        yield _counter("expert_copied_bytes", "Bytes of experts' weights copied", balancer.copied_bytes)
        yield _counter("expert_rollbacks", "Migration rounds that were rolled back", balancer.rollbacks)
        rows = GaugeMetricFamily(
            "moe_runtime_rank_expert_rows", "Recent rows per step that a rank's experts compute", labels=["rank"]
        )
        for rank, per_step in enumerate(balancer.rank_rows_per_step):
            rows.add_metric([str(rank)], per_step)
        yield rows


class RequestTimer:
    """Observes the latencies of one request, which arrives when the timer is created."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived = time.monotonic()
        self._last_token: float | None = None

    def tokens(self, count: int) -> None:
        """`count` tokens of the request have arrived now, in one step."""
        if count == 0:
            return
        now = time.monotonic()
        if self._last_token is None:
            self._metrics.time_to_first_token.observe(now - self._arrived)
        else:
            self._metrics.inter_token_latency.observe((now - self._last_token) / count)
        self._last_token = now

    def finished(self, reason: str) -> None:
        """The request has ended for `reason`, one of `FINISH_REASONS`."""
        self._metrics.e2e_latency.observe(time.monotonic() - self._arrived)
        self._metrics.requests.labels(reason).inc()


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"moe_runtime_{name}", help_text, value)


def _counter(name: str, help_text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"moe_runtime_{name}", help_text, value)
