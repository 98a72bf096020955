"""What `/metrics` says, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "querit_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self.open_requests = Gauge(
            "querit_open_requests", "Requests that have not been answered.", registry=self._registry
        )
        self.request_seconds = Histogram(
            "querit_request_seconds",
            "Time from a request's arrival to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.queue_seconds = Histogram(
            "querit_queue_seconds",
            "Time that a request waits before its first pair is scored.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.cached_pairs = Counter(
            "querit_cached_pairs", "Pairs whose score was in the cache.", registry=self._registry
        )
        self._pairs = Counter("querit_pairs", "Pairs scored.", registry=self._registry)
        self._tokens = Counter("querit_tokens", "Tokens computed.", registry=self._registry)
        self._batch_fill = Histogram(
            "querit_batch_fill",
            "Tokens of a forward pass as a share of the budget.",
            buckets=_SHARES,
            registry=self._registry,
        )
        self._batch_pairs = Histogram(
            "querit_batch_pairs",
            "Pairs in a forward pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self._registry,
        )
        self._queue_pairs = Gauge("querit_queue_pairs", "Pairs that wait.", registry=self._registry)

    def watch_queue(self, count: Callable[[], int]) -> None:
        """Have the length of the queue read by `count` whenever somebody asks."""
        self._queue_pairs.set_function(count)

    def count_step(self, pairs: int, tokens: int, fill: float) -> None:
        """Count one forward pass; `fill` is its share of the token budget."""
        self._pairs.inc(pairs)
        self._tokens.inc(tokens)
        self._batch_pairs.observe(pairs)
        self._batch_fill.observe(fill)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Write all numbers in Prometheus's text format."""
        return generate_latest(self._registry)
