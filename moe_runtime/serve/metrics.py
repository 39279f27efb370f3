"""Prometheus metrics of the server, in a separate registry. Names follow vLLM's if it has the same metric."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moe_runtime.serve.request_metrics import RequestMetrics, RequestTimer

if TYPE_CHECKING:
    from moe_runtime.balancer.load import ExpertLoad
    from moe_runtime.engine.stats import EngineStats
    from moe_runtime.serve.admission import Admission


class Metrics(Collector):
    """All metrics of one server.

    Attributes:
        stats: the engine's figures after its last step, read at every scrape; None while the model loads.
        admission: the bound of the engine's queue; None while the model loads.
        model_name: the label of all metrics; empty while the model loads.
    """

    def __init__(self) -> None:
        self.stats: EngineStats | None = None
        self.admission: Admission | None = None
        self.model_name = ""
        self._registry = CollectorRegistry()
        self._requests = RequestMetrics(self._registry)
        self._balancedness = Gauge(
            "moe_runtime_expert_balancedness",
            "Mean rank load / max rank load since the start (1 is perfect), as mean and min over layers",
            ["phase", "over_layers"],
            registry=self._registry,
        )
        self._registry.register(self)

    def start_timer(self) -> RequestTimer:
        """A timer for a request that arrives now."""
        return RequestTimer(self._requests)

    def set_expert_load(self, load: ExpertLoad) -> None:
        """Update the gauges of balancedness."""
        for phase in load.tokens:
            balancedness_L = load.balancedness(phase)
            self._balancedness.labels(phase, "mean").set(float(balancedness_L.mean()))
            self._balancedness.labels(phase, "min").set(float(balancedness_L.min()))

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(_Named(self._registry, self.model_name))

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        stats = self.stats
        if stats is None:
            return
        yield _gauge("num_requests_running", "Requests that are running", stats.num_running)
        yield _gauge("num_requests_waiting", "Requests waiting to be admitted", stats.num_waiting)
        if self.admission is not None:
            refused = "Requests refused because as many waited as may"
            yield _counter("requests_refused", refused, self.admission.num_refused)
        lowered = "Requests that got fewer experts per token because many waited"
        yield _counter("overload_routing_requests", lowered, stats.overload.num_requests)
        yield _gauge("overload_routing_active", "1 while new requests get fewer", stats.overload.is_active)
        usage = "Share of KV cache pages in use, 0 to 1, of the page group that is fullest"
        yield _gauge("kv_cache_usage_perc", usage, stats.kv_cache_usage)
        pages = GaugeMetricFamily(
            "moe_runtime_kv_cache_pages", "Pages of the layers with this window, by state", labels=["window", "state"]
        )
        for group in stats.page_counts:
            window = str(group.window or "none")
            pages.add_metric([window, "used"], group.used)
            pages.add_metric([window, "free"], group.total - group.used)
        yield pages
        prefixes = stats.prefix_cache
        yield _counter("prefix_cache_queries", "Tokens looked up in the prefix cache", prefixes.queries)
        yield _counter("prefix_cache_hits", "Tokens found in the prefix cache, so not computed", prefixes.hits)
        yield _counter("prefix_cache_evictions", "Pages whose cached content was forgotten", prefixes.evictions)
        yield _counter("num_preemptions", "Requests preempted because pages ran out", stats.num_preemptions)
        yield _counter("prompt_tokens", "Prompt tokens processed, cached ones included", stats.prompt_tokens)
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


class _Named(Collector):
    """The metrics of a registry with the label `model_name`."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._label = {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample._replace(labels=self._label | sample.labels) for sample in family.samples]
            yield family


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"moe_runtime_{name}", help_text, value)


def _counter(name: str, help_text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"moe_runtime_{name}", help_text, value)
