"""LMCache's two plug-in points: the L2 adapter of its server (MP mode) and the remote connector of its engine.

    lmcache server ... --l2-adapter '{"type": "plugin", "module_path": "kvstore.connectors.lmcache",
        "class_name": "KvstoreL2Adapter", "adapter_params": {"url": "http://127.0.0.1:8420"}}'

    remote_storage_plugins: ["kvstore"]
    extra_config:
      remote_storage_plugin.kvstore.module_path: kvstore.connectors.lmcache
      remote_storage_plugin.kvstore.class_name: KvstoreConnectorAdapter
      remote_storage_plugin.kvstore.url: http://127.0.0.1:8420

Both only translate: keys and buffers of LMCache into chunks for a `ChunkStore`, and its answers back. The adapter is
here, the remote connector in `lmcache_engine`; no other module imports LMCache, which imports this one by name.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Any, NamedTuple

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from kvstore.backend import Outcome
from kvstore.connectors.lmcache_buffers import bytes_of, check_version, parts_of
from kvstore.connectors.lmcache_chunks import Chunk, Codec, Codecs, Shape, Shard
from kvstore.connectors.lmcache_engine import KvstoreConnectorAdapter, KvstoreRemoteConnector
from kvstore.connectors.lmcache_metrics import COUNTS
from kvstore.connectors.lmcache_options import fails_open, parse_options
from kvstore.connectors.lmcache_store import ChunkStore
from kvstore.errors import KVStoreError, PipelineError
from kvstore.keys import ChunkKey

__all__ = ["KvstoreConnectorAdapter", "KvstoreL2Adapter", "KvstoreRemoteConnector"]

_KEPT = (Outcome.WRITTEN, Outcome.EXTENDED, Outcome.EXISTS, Outcome.OTHER)

log = logging.getLogger(__name__)


class KvstoreL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """L2 adapter of `lmcache server`.

    Args:
        params: `adapter_params`; see `LMCacheOptions`.
        l1_memory_desc: Not needed.

    Raises:
        ConfigError: An option is wrong or the server cannot be used, and `fail_open` is off.
    """

    def __init__(self, params: Mapping[str, object], l1_memory_desc: object = None) -> None:
        # No capacity: the server has its own budgets and evicts by itself.
        super().__init__(max_capacity_bytes=0)
        check_version()
        self._problem = ""
        self._store: ChunkStore | None = None
        self._seen: dict[tuple[str, int, int], Codec] = {}
        try:
            options = parse_options(params)
            self._codecs = Codecs(options)
            self._single_plane = options.single_plane
            self._store = ChunkStore(options)
            COUNTS.add(self._store)
        except KVStoreError as exc:
            if not fails_open(params):
                raise
            self._problem = str(exc)
            log.error("LMCache runs without kvstore: %s", exc)  # noqa: TRY400
        self._lock = threading.Lock()
        self._closed = False
        self._last_task = 0
        self._stored = _Results()
        self._found = _Results()
        self._loaded = _Results()

    def get_store_event_fd(self) -> int:
        return self._stored.fd

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._found.fd

    def get_load_event_fd(self) -> int:
        return self._loaded.fd

    def submit_store_task(self, keys: Sequence[Any], objects: Sequence[Any]) -> int:
        chunks = self._chunks(keys, objects)
        sizes = [len(chunk.data) for chunk in chunks]

        def result(outcomes: list[Outcome]) -> L2StoreResult:
            new = [number for number, outcome in enumerate(outcomes) if outcome is Outcome.WRITTEN]
            if new:
                self._notify_keys_stored([keys[number] for number in new], [sizes[number] for number in new])
            kept = [size for size, outcome in zip(sizes, outcomes, strict=True) if outcome in _KEPT]
            return L2StoreResult(len(kept) == len(keys), sum(kept))

        store = self._store
        if store is None or len(chunks) < len(keys):
            return self._task(None, lambda _: L2StoreResult(False, 0), self._stored)
        return self._task(store.store(chunks), result, self._stored)

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        return self._stored.pop_all()

    def submit_lookup_and_lock_task(self, keys: Sequence[Any], group_layout_descs: Mapping[int, Any]) -> int:
        # Nothing is locked: a chunk that is evicted before it is loaded is a miss then.
        rows = self._rows(keys, group_layout_descs)

        def result(found: list[list[bool]]) -> Any:
            held = Bitmap(len(keys))
            for row, answers in zip(rows, found, strict=True):
                for number, answer in zip(row.numbers, answers, strict=True):
                    if answer:
                        held.set(number)
            return held

        if self._store is None:
            return self._task(None, lambda _: Bitmap(len(keys)), self._found)
        # Of a group with a sliding window only the last chunks of a prompt may have been stored.
        gaps = len({key.object_group_id for key in keys}) > 1
        codec = max((row.codec for row in rows), key=lambda one: one.chunk_tokens, default=None)
        found = self._store.find([row.keys for row in rows], codec=codec, gaps=gaps)
        return self._task(found, result, self._found)

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        return self._found.pop(task_id)

    def submit_unlock(self, keys: Sequence[Any]) -> None:
        pass

    def submit_load_task(self, keys: Sequence[Any], objects: Sequence[Any]) -> int:
        chunks = self._chunks(keys, objects)

        def result(sizes: list[int]) -> Any:
            loaded = Bitmap(len(keys))
            for number, (chunk, size_bytes) in enumerate(zip(chunks, sizes, strict=True)):
                if size_bytes == len(chunk.data):
                    loaded.set(number)
            hits = [key for number, key in enumerate(keys) if loaded.test(number)]
            if hits:
                self._notify_keys_accessed(hits)
            return loaded

        if self._store is None or len(chunks) < len(keys):
            return self._task(None, lambda _: Bitmap(len(keys)), self._loaded)
        return self._task(self._store.load(chunks), result, self._loaded)

    def query_load_result(self, task_id: int) -> Any:
        return self._loaded.pop(task_id)

    def delete(self, keys: Sequence[Any]) -> None:
        known = [(key, codec) for key in keys if (codec := self._known(key)) is not None]
        if self._store is None or not known:
            return

        def deleted(future: "Future[bool]") -> None:
            if future.result():
                self._notify_keys_deleted([key for key, _ in known], [codec.size_bytes for _, codec in known])

        self._store.delete([_object_key(codec, key) for key, codec in known]).add_done_callback(deleted)

    def report_status(self) -> dict[str, Any]:
        if self._store is None:
            return {"is_healthy": False, "detail": self._problem}
        return self._store.status()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._store is not None:
            self._store.close()
            COUNTS.remove(self._store)
        for results in (self._stored, self._found, self._loaded):
            results.close()

    def _task(self, future: "Future[Any] | None", result: Callable[[Any], Any], results: "_Results") -> int:
        """A task that ends when the future does."""
        with self._lock:
            self._last_task += 1
            task = self._last_task
        if future is None:
            results.put(task, result(None))
        else:
            future.add_done_callback(lambda done: results.put(task, result(done.result())))
        return task

    def _rows(self, keys: Sequence[Any], described: Mapping[int, Any]) -> "list[_Row]":
        """Keys by shard and group, without those of groups that LMCache does not describe."""
        rows = []
        for (_, group), found in groupby(enumerate(keys), key=lambda one: (one[1].kv_rank, one[1].object_group_id)):
            numbers = [number for number, _ in found]
            codec = self._codec(keys[numbers[0]], described.get(group))
            if codec is not None:
                rows.append(_Row(codec, numbers, [_object_key(codec, keys[number]) for number in numbers]))
        return rows

    def _chunks(self, keys: Sequence[Any], objects: Sequence[Any]) -> list[Chunk]:
        chunks = []
        for key, one in zip(keys, objects, strict=True):
            codec = self._codec(key, one.metadata)
            if codec is not None:
                chunks.append(Chunk(_object_key(codec, key), codec, bytes_of(one)))
        return chunks

    def _codec(self, key: Any, described: Any) -> Codec | None:
        """The codec of a key's chunks, None where LMCache does not say what they are."""
        if described is None or self._store is None:
            return None
        shard = Shard(key.model_name, key.kv_rank >> 16 & 0xFF, key.kv_rank >> 24 & 0xFF)
        try:
            codec = self._codecs.of(shard, Shape(parts_of(described), self._single_plane))
        except PipelineError as exc:
            log.warning("LMCache's chunks are not stored: %s", exc)
            return None
        self._seen[key.model_name, key.kv_rank, key.object_group_id] = codec
        return codec

    def _known(self, key: Any) -> Codec | None:
        return self._seen.get((key.model_name, key.kv_rank, key.object_group_id))


class _Row(NamedTuple):
    """Chunks of one shard and group: their numbers among all that LMCache asks for, and their keys."""

    codec: Codec
    numbers: list[int]
    keys: list[ChunkKey]


class _Results:
    """Results of tasks for one of LMCache's controllers, and the file descriptor that tells of them."""

    def __init__(self) -> None:
        self._notifier = create_event_notifier()
        self._lock = threading.Lock()
        self._results: dict[int, Any] = {}
        self._closed = False
        self.fd: int = self._notifier.fileno()

    def put(self, task: int, result: Any) -> None:
        with self._lock:
            if not self._closed:
                self._results[task] = result
                # LMCache asks as soon as it is told, so the result comes first.
                self._notifier.notify()

    def pop(self, task: int) -> Any:
        with self._lock:
            return self._results.pop(task, None)

    def pop_all(self) -> dict[int, Any]:
        with self._lock:
            results, self._results = self._results, {}
            return results

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._notifier.close()


def _object_key(codec: Codec, key: Any) -> ChunkKey:
    """Key of a chunk from every field of an `ObjectKey`."""
    numbers = f"{key.kv_rank} {key.object_group_id}".encode()
    return codec.key(b"object", key.chunk_hash, key.model_name.encode(), numbers, key.cache_salt.encode())
