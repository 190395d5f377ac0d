"""What the service counts and times, as Prometheus text."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from reward_server.scorers.base import Outcome

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """One registry per service, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "reward_requests",
            "answers by path and status",
            ["path", "status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "reward_request_seconds",
            "from the first byte to the answer",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "reward_batch_seconds",
            "time in a scorer",
            ["scorer"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_items = Histogram(
            "reward_batch_items",
            "items per batch",
            ["scorer"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.failures = Counter(
            "reward_failures",
            "components that could not be scored, by kind",
            ["scorer", "kind"],
            registry=self.registry,
        )
        self.rejected = Counter(
            "reward_rejected",
            "requests or items refused, by reason",
            ["reason"],
            registry=self.registry,
        )

        self.cache = Counter(
            "reward_cache",
            "items (answers), masks and references (pictures) found among those of before",
            ["cache", "result"],
            registry=self.registry,
        )

    def count_cache(self, cache: str, *, hit: bool) -> None:
        """Count a look-up in `cache`."""
        self.cache.labels(cache, "hit" if hit else "miss").inc()

    def watch_queue(self, scorer: str, length: Callable[[], int]) -> None:
        """Report a queue's length whenever the metrics are read."""
        if not hasattr(self, "queue"):
            self.queue = Gauge(
                "reward_queue_items", "items waiting", ["scorer"], registry=self.registry
            )
        self.queue.labels(scorer).set_function(length)

    def count_batch(self, scorer: str, items: int, seconds: float, outcomes: list[Outcome]) -> None:
        """Called by a batcher after each batch."""
        self.batch_items.labels(scorer).observe(items)
        self.batch_seconds.labels(scorer).observe(seconds)
        for outcome in outcomes:
            self.count_failures(scorer, outcome)

    def count_failures(self, scorer: str, outcome: Outcome) -> None:
        """Count the components that an outcome lacks, by the kind of its errors."""
        for field in outcome.errors:
            self.failures.labels(scorer, outcome.kind_of(field)).inc()

    def text(self) -> bytes:
        """Prometheus exposition format."""
        return generate_latest(self.registry)
