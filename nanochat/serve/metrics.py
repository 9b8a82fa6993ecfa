"""What Prometheus may know: counts and times of requests, what each engine says of itself. No text, no addresses."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanochat.serve.pool import Pool, Ticket

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
GAUGES = {"running": "replies that get tokens", "waiting": "replies that wait", "blocks_used": "cache blocks in use",
          "blocks_free": "cache blocks that a reply could get"}  # fmt: skip
TOTALS = {"prompt_tokens": "tokens of prompts", "cached_tokens": "of them, found in the cache",
          "generated_tokens": "tokens made", "preemptions": "replies that gave way to others",
          "drafted_tokens": "tokens guessed", "accepted_tokens": "of them, right"}  # fmt: skip


class Metrics:
    """One server's. `registry` holds them all."""

    def __init__(self, pool: Pool):
        self.pool, self.registry = pool, CollectorRegistry()
        kind = {"namespace": "nanochat", "registry": self.registry}
        self.requests = Counter("requests", "HTTP requests", ["path", "status"], **kind)
        self.replies = Counter("replies", "replies, by why they ended", ["finish"], **kind)
        self.first = Histogram("time_to_first_token_seconds", "from request to first token", buckets=SECONDS, **kind)
        self.each = Histogram("time_per_token_seconds", "of the tokens after it", buckets=TOKEN_SECONDS, **kind)
        self.registry.register(self)

    def finished(self, ticket: Ticket) -> None:
        """A request is over."""
        for finish in ticket.ends:
            self.replies.labels(finish).inc()
        if ticket.first is not None:
            self.first.observe(ticket.first - ticket.begun)
            if ticket.tokens > ticket.replies:
                each = (time.monotonic() - ticket.first) / (ticket.tokens / ticket.replies - 1)
                self.each.observe(max(each, 0.0))

    def collect(self) -> Iterator[Metric]:
        """The engines' own figures, at the time of asking (prometheus_client calls this)."""
        workers = self.pool.workers
        tables = [
            (GaugeMetricFamily, name, text, [w.stats.get(name, 0) for w in workers]) for name, text in GAUGES.items()
        ]
        tables += [(CounterMetricFamily, n, text, [w.stats.get(n, 0) for w in workers]) for n, text in TOTALS.items()]
        tables.append((GaugeMetricFamily, "ready", "whether the engine answers", [int(w.ready) for w in workers]))
        tables.append((GaugeMetricFamily, "in_flight", "replies asked for and not over", [w.load for w in workers]))
        tables.append((CounterMetricFamily, "restarts", "engine processes that died", [w.restarts for w in workers]))
        for family, name, text, values in tables:
            metric = family(f"nanochat_engine_{name}", text, labels=["engine"])
            for i, value in enumerate(values):
                metric.add_metric([str(i)], value)
            yield metric

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry)
