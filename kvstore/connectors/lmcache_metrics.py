"""Counters of the LMCache connector in the registry that LMCache's own `/metrics` shows.

`prometheus_client` allows a name once in a process; plug-ins may be there several times. So one collector adds up all
stores that are open.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

COUNTERS = {
    "found_chunks": "Chunks that look-ups found.",
    "loaded_chunks": "Chunks loaded.",
    "loaded_bytes": "Bytes of loaded chunks, decoded.",
    "received_bytes": "Bytes of loaded chunks, as they came from the server.",
    "missed_chunks": "Chunks not found or not loaded, by reason.",
    "stored_chunks": "Chunks stored that were not there before.",
    "sent_bytes": "Bytes of stored chunks, as they went to the server.",
    "dropped_chunks": "Chunks not stored as the queue was full.",
    "failed_chunks": "Chunks that could not be encoded or stored.",
    "refused_chunks": "Chunks that were found, but are expected to take longer to fetch than to compute.",
    "errors": "Requests that failed, by cause.",
}
"""Names of the counters, each `kvstore_lmcache_NAME_total`."""

_LABELLED = {"missed_chunks": ("reason", "missed_", "_chunks"), "errors": ("cause", "", "_errors")}
"""Those with a label, its name, and what is before and behind its values in the names of counts."""


class Counting(Protocol):
    """What has counts."""

    counts: Counter[str]


class _Counts(Collector):
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[Counting] = weakref.WeakSet()
        self._closed: Counter[str] = Counter()

    def add(self, store: Counting) -> None:
        """Count a store in."""
        with self._lock:
            self._open.add(store)

    def remove(self, store: Counting) -> None:
        """Keep what a store has counted, as counters never go back."""
        with self._lock:
            if store in self._open:
                self._open.discard(store)
                self._closed.update(store.counts)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            counts = self._closed + sum((Counter(dict(store.counts)) for store in self._open), Counter())
        return families(counts)


def families(counts: Counter[str]) -> Iterator[Metric]:
    """Counts as Prometheus has them."""
    for name, text in COUNTERS.items():
        label, before, behind = _LABELLED.get(name, ("", "", ""))
        family = CounterMetricFamily(f"kvstore_lmcache_{name}", text, labels=[label] if label else [])
        if label:
            for found, value in counts.items():
                if found.startswith(before) and found.endswith(behind):
                    family.add_metric([found.removeprefix(before).removesuffix(behind)], value)
        else:
            family.add_metric([], counts[name])
        yield family


COUNTS = _Counts()
REGISTRY.register(COUNTS)
