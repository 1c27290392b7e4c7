"""Counters of the LMCache connector in the registry that LMCache's own `/metrics` shows.

`prometheus_client` allows a name once in a process; plug-ins may be there several times. So one collector adds up all
stores that are open.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
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
    "errors": "Requests that failed.",
}
"""Names of the counters, each `kvstore_lmcache_NAME_total`."""

_MISSED = "missed_"


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
        missed = name == "missed_chunks"
        family = CounterMetricFamily(f"kvstore_lmcache_{name}", text, labels=["reason"] if missed else [])
        for labels, value in _misses(counts) if missed else [([], counts[name])]:
            family.add_metric(labels, value)
        yield family


def _misses(counts: Counter[str]) -> Iterable[tuple[list[str], int]]:
    return [
        ([name.removeprefix(_MISSED).removesuffix("_chunks")], value)
        for name, value in counts.items()
        if name.startswith(_MISSED)
    ]


COUNTS = _Counts()
REGISTRY.register(COUNTS)
