"""Prometheus histograms of single requests. Names follow vLLM's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram

if TYPE_CHECKING:
    from moe_runtime.types.outputs import OutputDelta

FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
WHOLE_REQUEST = (0.005, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = tuple(float(2**power) for power in range(18))
FINISH_REASONS = ("stop", "length", "abort", "timeout", "queue_timeout", "error")


class RequestMetrics:
    """What is observed of every request. All are in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"moe_runtime_{name}", help_text, buckets=buckets, registry=registry)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Time from a request's arrival to its first token", FIRST_TOKEN
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Time between two tokens of a request", NEXT_TOKEN
        )
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds",
            "A request's mean time per output token after the first",
            NEXT_TOKEN,
        )
        self.e2e_latency = histogram(
            "e2e_request_latency_seconds", "Time from a request's arrival to its end", WHOLE_REQUEST
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "Time from a request's arrival to the plan of its first step", WHOLE_REQUEST
        )
        self.prefill_time = histogram(
            "request_prefill_time_seconds", "Time from the plan of the first step to the first token", WHOLE_REQUEST
        )
        self.decode_time = histogram(
            "request_decode_time_seconds", "Time from a request's first token to its last", WHOLE_REQUEST
        )
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a request's prompt", TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens generated for a request", TOKENS)
        self.ended = Counter(
            "moe_runtime_request_success",
            "Requests that have ended, by reason",
            ["finished_reason"],
            registry=registry,
        )
        for reason in FINISH_REASONS:
            self.ended.labels(reason)


class RequestTimer:
    """Observes one request, which arrives when the timer is created."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._arrived = time.monotonic()
        self._first_token: float | None = None
        self._last_token = 0.0
        self._num_tokens = 0

    def took(self, delta: OutputDelta) -> None:
        """A step's output of the request has arrived now."""
        count = len(delta.token_ids)
        now = time.monotonic()
        if delta.scheduled_at is not None:
            self._metrics.queue_time.observe(max(0.0, delta.scheduled_at - self._arrived))
            self._metrics.prefill_time.observe(now - delta.scheduled_at)
            self._metrics.prompt_tokens.observe(delta.num_prompt_tokens)
        if count == 0:
            return
        if self._first_token is None:
            self._first_token = now
            self._metrics.time_to_first_token.observe(now - self._arrived)
        else:
            self._metrics.inter_token_latency.observe((now - self._last_token) / count)
        self._last_token = now
        self._num_tokens += count

    def finished(self, reason: str) -> None:
        """The request has ended for `reason`, one of `FINISH_REASONS`."""
        self._metrics.e2e_latency.observe(time.monotonic() - self._arrived)
        self._metrics.ended.labels(reason).inc()
        self._metrics.generation_tokens.observe(self._num_tokens)
        if self._first_token is not None:
            decode_time = self._last_token - self._first_token
            self._metrics.decode_time.observe(decode_time)
            if self._num_tokens > 1:
                self._metrics.time_per_output_token.observe(decode_time / (self._num_tokens - 1))
