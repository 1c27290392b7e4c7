"""A secondary tier of vLLM's own offloading: behind its tier in host memory, chunks go to a server that others share.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592,
        "secondary_tiers": [{"type": "KvstoreTier", "module_path": "kvstore.connectors.vllm_offload",
                             "url": "http://127.0.0.1:8420"}]}}'

A third face of what the connector for LMCache is made of. vLLM hands over rows of bytes and does not say what is in
them, so they are stored as they are, and their namespace is made of everything that decides what they mean.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    RequestOffloadingContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from kvstore.backend import Outcome
from kvstore.connectors.lmcache_chunks import Chunk, Codec, Shape, Shard
from kvstore.connectors.lmcache_options import LMCacheOptions, fails_open, parse_options
from kvstore.connectors.lmcache_store import ChunkStore
from kvstore.errors import ConfigError, KVStoreError
from kvstore.keys import ChunkKey

_COUNTS = "vllm:kvstore_offload"
_UNUSED = ("head_dim", "level", "pipeline", "single_plane", "store_derived")
"""Options for chunks of which it is known what they hold."""

log = logging.getLogger(__name__)


class KvstoreTier(SecondaryTierManager):  # type: ignore[misc]
    """Secondary tier of a `TieringOffloadingSpec`; all methods run in vLLM's scheduler and return at once.

    Args:
        offloading_spec: What vLLM offloads.
        primary_kv_view: Memory of the tier in front, a row of bytes for each chunk.
        tier_type: Name of this class.
        backpressure_detector: vLLM's own.
        locality: `LOCAL` or `REMOTE`, for vLLM's events.
        given: Options as for LMCache, without those for pipelines.

    Raises:
        ConfigError: An option is wrong or the server cannot be used, and `fail_open` is off.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        locality: str = "REMOTE",
        **given: object,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality(locality)
        self._rows = primary_kv_view.cast("B")
        self._running: set[Future[None]] = set()
        self._finished: SimpleQueue[_Finished] = SimpleQueue()
        self._told: Counter[str] = Counter()
        self._store: ChunkStore | None = None
        try:
            options = _options(given)
            self._codec = _codec(offloading_spec.config, self.block_size_bytes, options)
            self._store = ChunkStore(options)
        except KVStoreError as exc:
            if not fails_open(given):
                raise
            log.error("vLLM offloads without kvstore: %s", exc)  # noqa: TRY400
        self._lookups = None if self._store is None else _Lookups(tier_type, self._store, self._codec, offloading_spec)

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        text = "What the kvstore tier counted: chunks found, loaded, missed, stored, ... and errors."
        return {_COUNTS: OffloadingCounterMetadata(text, labelnames=("count",))}

    def get_stats(self) -> Any:
        stats = OffloadingConnectorStats()
        counts = Counter() if self._store is None else Counter(dict(self._store.counts))
        for name, amount in (counts - self._told).items():
            stats.increase_counter(_COUNTS, amount, labelvalues=(name,))
        self._told = counts
        return stats

    def lookup(self, key: bytes, req_context: Any) -> Any:
        if self._lookups is None:
            return LookupResult.MISS
        found = self._lookups.lookup(key, req_context)
        return LookupResult.RETRY if found is None else LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: Any) -> None:
        keys = list(job_metadata.keys)
        if self._store is None:
            self._finished.put(_Finished(JobResult(job_metadata.job_id, False), []))
            return

        def result(outcomes: list[Outcome]) -> _Finished:
            size_bytes = self.block_size_bytes * outcomes.count(Outcome.WRITTEN)
            whole = Outcome.FAILED not in outcomes
            return _Finished(JobResult(job_metadata.job_id, whole, transfer_bytes=size_bytes), [])

        self._run(self._store.store(self._chunks(keys, job_metadata.chunk_ids)), result)

    def submit_load(self, job_metadata: Any) -> None:
        keys = list(job_metadata.keys)
        assert self._store is not None, "without a store nothing is found"

        def result(sizes: list[int]) -> _Finished:
            hits = [key for key, size_bytes in zip(keys, sizes, strict=True) if size_bytes == self.block_size_bytes]
            misses = [key for key in keys if key not in set(hits)]
            job = JobResult(job_metadata.job_id, not misses, tuple(hits) or None, transfer_bytes=sum(sizes))
            return _Finished(job, misses)

        self._run(self._store.load(self._chunks(keys, job_metadata.chunk_ids)), result)

    def get_finished_jobs(self) -> Iterable[Any]:
        results: list[Any] = []
        while True:
            try:
                finished = self._finished.get_nowait()
            except Empty:
                return results
            if self._lookups is not None:
                # Else vLLM would load the same again and again.
                self._lookups.mark_miss(finished.misses)
            results.append(finished.result)

    def has_pending_work(self) -> bool:
        return bool(self._running) or not self._finished.empty()

    def on_new_request(self, req_context: Any) -> Any:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        if self._lookups is not None:
            self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: Any) -> None:
        if self._lookups is not None:
            self._lookups.flush()

    def drain_jobs(self) -> None:
        wait(set(self._running))

    def shutdown(self) -> None:
        if self._store is not None and self._lookups is not None:
            self._store.close()
            self._lookups.shutdown()
        self._rows.release()

    def _run(self, future: "Future[Any]", result: Callable[[Any], "_Finished"]) -> None:
        # The job's own future is set before its callbacks run, so it cannot be waited for.
        told: Future[None] = Future()
        self._running.add(told)

        def done(_: object) -> None:
            self._finished.put(result(future.result()))
            self._running.discard(told)
            told.set_result(None)

        future.add_done_callback(done)

    def _chunks(self, keys: Sequence[bytes], rows: Collection[Any]) -> list[Chunk]:
        size_bytes = self.block_size_bytes
        starts = [int(row) * size_bytes for row in rows]
        return [
            Chunk(_key(self._codec, key), self._codec, self._rows[start : start + size_bytes])
            for key, start in zip(keys, starts, strict=True)
        ]


class _Finished(NamedTuple):
    """A job that ended, and the keys that it was to load and did not."""

    result: Any
    misses: list[bytes]


class _Lookups(AsyncLookupManager):  # type: ignore[misc]
    """vLLM's own batches of look-ups, on a thread of its own."""

    def __init__(self, tier_type: str, store: ChunkStore, codec: Codec, spec: Any) -> None:
        self._store = store
        self._codec = codec
        # What these chunks hold is not known, but how many tokens it is.
        codec.chunk_tokens = spec.config.groups[0].tokens_per_block * spec.config.cache.blocks_per_chunk
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[bytes], req_context: Any) -> Iterable[bool]:
        # vLLM asks for one group after the other; those with a window from the end, and with gaps.
        rows = [[_key(self._codec, key) for key in row] for _, row in groupby(keys, get_offload_group_idx)]
        found = self._store.find(rows, codec=self._codec, gaps=len(rows) > 1).result()
        return [held for row in found for held in row]


def _options(given: dict[str, Any]) -> LMCacheOptions:
    for name in _UNUSED:
        if name in given:
            raise ConfigError(f"{name}: cannot be used here, as vLLM does not say what its offloaded chunks hold")
    return parse_options(given)


def _codec(config: Any, size_bytes: int, options: LMCacheOptions) -> Codec:
    """Chunks as rows of bytes, in a namespace of all that says what is in them."""
    parallel = asdict(config.parallel)
    identity = {
        "groups": [asdict(group) for group in config.groups],
        "cache": asdict(config.cache),
        "dtype": config.model.dtype,
        "parallel": {name: size for name, size in parallel.items() if name.endswith("p_size")},
        "layout": [config.kv_cache_layout, config.canonical_layout, config.replicated_layout],
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    named = replace(options, revision=f"vllm {digest} {options.revision}")
    return Codec(Shard(config.model.name, 0, 1), Shape((((size_bytes,), "uint8"),)), named)


def _key(codec: Codec, key: bytes) -> ChunkKey:
    return codec.key(b"offload", bytes(key))
