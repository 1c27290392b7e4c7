"""Counters and gauges of one server, in a registry of its own so that two servers never share figures.

Labels are bounded: they name routes, tiers, reasons and outcomes, never keys, tenants or addresses.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_DECISION_SECONDS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.005)


class Metrics:
    """Everything that kvstore counts; `/metrics` shows it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.requests = self._counter("kvstore_requests", "Requests answered.", ("route", "status"))
        self.request_seconds = Histogram(
            "kvstore_request_seconds",
            "Time from the request's header to the last byte of the answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.received_bytes = self._counter("kvstore_received_bytes", "Bytes of request bodies received.")
        self.sent_bytes = self._counter("kvstore_sent_bytes", "Bytes of frames and blobs sent.")
        self.hits = self._counter("kvstore_hits", "Chunks served, by tier.", ("tier",))
        self.misses = self._counter("kvstore_misses", "Chunks not served, by reason.", ("reason",))
        self.puts = self._counter("kvstore_puts", "Chunks put, by outcome.", ("outcome",))
        self.evictions = self._counter("kvstore_evictions", "Chunks evicted for room.", ("tier",))
        self.shrinks = self._counter("kvstore_shrinks", "Chunks that lost their top levels for room.", ("tier",))
        self.placements = self._counter(
            "kvstore_placements", "Decisions of the learned placement, by the highest level kept.", ("tier", "level")
        )
        self.fetched_levels = self._counter(
            "kvstore_fetched_levels", "Chunks fetched, by the highest level asked for.", ("tier", "level")
        )
        self.corrupt = self._counter("kvstore_corrupt", "Damaged frames found and taken away.", ("tier",))
        self.write_failures = self._counter(
            "kvstore_write_behind_failures", "Chunks that a write-behind queue could not store.", ("tier",)
        )
        self.write_skips = self._counter(
            "kvstore_write_behind_skips", "Chunks put past a tier that was down and whose queue was full.", ("tier",)
        )
        self.scrubbed_bytes = self._counter("kvstore_scrubbed_bytes", "Bytes that the scrubber verified.", ("tier",))
        self.s3_requests = self._counter(
            "kvstore_s3_requests", "Requests to S3, by what came of them.", ("operation", "outcome")
        )
        self.breaker_opened = self._counter(
            "kvstore_breaker_opened", "Times that a tier was left alone after failures.", ("tier",)
        )
        self.tier_up = self._gauge("kvstore_tier_up", "Whether a tier serves.", ("tier",))
        self.chunks = self._gauge("kvstore_tier_chunks", "Chunks held.", ("tier",))
        self.used_bytes = self._gauge("kvstore_tier_bytes", "Bytes held.", ("tier",))
        self.budget_bytes = self._gauge("kvstore_tier_budget_bytes", "Bytes that may be held.", ("tier",))
        self.waits = self._counter("kvstore_waits", "Requests that waited for chunks, by how that ended.", ("outcome",))
        self.waiting = self._gauge("kvstore_waiting", "Requests that wait for chunks.", ())
        self.fetching_bytes = self._gauge("kvstore_fetching_bytes", "Bytes of chunks that fetches hold.", ())
        self.queued_bytes = self._gauge("kvstore_write_behind_bytes", "Bytes waiting to be written.", ("tier",))
        self._add_decisions()

    def render(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)

    def _add_decisions(self) -> None:
        """What the controller decides and learns."""
        self.decisions = self._counter(
            "kvstore_decisions",
            "Plans made, by what was asked and what is to be done.",
            ("operation", "action", "reason"),
        )
        self.decision_seconds = Histogram(
            "kvstore_decision_seconds",
            "Time that a decision takes, the look-up not counted.",
            buckets=_DECISION_SECONDS,
            registry=self.registry,
        )
        self.outcomes = self._counter(
            "kvstore_outcomes", "Outcomes that clients have reported, by whether something was learned.", ("result",)
        )
        self.given_up = self._gauge(
            "kvstore_posteriors_given_up", "Times that what was learned of an arm was given up for the model.", ()
        )

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)
