"""LMCache's remote connector, for its engine inside vLLM; `kvstore.connectors.lmcache` says how to use it."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.connector import ConnectorAdapter, extract_plugin_type
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from kvstore.connectors.lmcache_buffers import bytes_of, check_version, name_of
from kvstore.connectors.lmcache_chunks import Chunk, Codec, Codecs, Shape, Shard
from kvstore.connectors.lmcache_metrics import COUNTS
from kvstore.connectors.lmcache_options import LMCacheOptions, SinglePlane, fails_open, parse_options
from kvstore.connectors.lmcache_store import ChunkStore
from kvstore.errors import ConfigError, KVStoreError, PipelineError
from kvstore.keys import ChunkKey

PLUGIN = "kvstore"
"""What the name of the plug-in in `remote_storage_plugins` begins with, up to the first dot."""

Buffers = list[Any]
Rows = list[list[bool]]

_LOOP_S = 2.0
"""Time that LMCache's event loop gets to begin what it was given."""

log = logging.getLogger(__name__)


class KvstoreConnectorAdapter(ConnectorAdapter):  # type: ignore[misc]
    """Makes the remote connector of LMCache's engine; the plug-in's name must begin with `kvstore`."""

    def __init__(self) -> None:
        super().__init__(f"plugin://{PLUGIN}")

    def can_parse(self, url: str) -> bool:
        scheme, _, name = url.partition("://")
        return scheme == "plugin" and bool(extract_plugin_type(name) == PLUGIN)

    def create_connector(self, context: Any) -> "KvstoreRemoteConnector":
        prefix = f"remote_storage_plugin.{context.plugin_name}."
        extra = context.config.extra_config or {}
        given = {name.removeprefix(prefix): value for name, value in extra.items() if name.startswith(prefix)}
        given = {name: value for name, value in given.items() if name not in ("module_path", "class_name")}
        try:
            check_version()
            return KvstoreRemoteConnector(context, parse_options(given))
        except KVStoreError as exc:
            # LMCache logs every error of a connector, its own `IrrecoverableException` too, and goes on without it.
            if fails_open(given):
                raise
            raise SystemExit(f"kvstore: {exc}") from exc


class KvstoreRemoteConnector(RemoteConnector):  # type: ignore[misc]
    """Remote connector of LMCache's engine.

    Args:
        context: What LMCache gives to its connectors.
        options: The connector's options.

    Raises:
        ConfigError: LMCache's own settings do not fit, or the server cannot be used and `fail_open` is off.
    """

    def __init__(self, context: Any, options: LMCacheOptions) -> None:
        super().__init__(context.config, context.metadata)
        if context.config.use_layerwise:
            raise ConfigError("use_layerwise: chunks by layer are not supported; set it to false")
        if context.config.remote_serde != "naive":
            raise ConfigError(
                f"remote_serde: {context.config.remote_serde!r} hides what is in a chunk; set it to 'naive' and "
                "choose a pipeline of kvstore instead"
            )
        self._memory = context.local_cpu_backend
        self._metadata = context.metadata
        self._shape = self._full_shape(options)
        self._codecs = Codecs(options)
        try:
            self._codecs.of(self._shard(context.metadata), self._shape)
        except PipelineError as exc:
            raise ConfigError(str(exc)) from exc
        self._store = ChunkStore(options)
        COUNTS.add(self._store)
        self._loop = context.loop
        # LMCache frees its buffers before it closes what reads them.
        _before(self._memory, "close", self._flush)

    async def exists(self, key: Any) -> bool:
        return await self.batched_async_contains("", [key]) == 1

    def exists_sync(self, key: Any) -> bool:
        return self.batched_contains([key]) == 1

    async def get(self, key: Any) -> Any:
        [found] = await self.batched_get([key])
        return found

    async def put(self, key: Any, memory_obj: Any) -> None:
        await self.batched_put([key], [memory_obj])

    async def list(self) -> list[str]:
        # Keys are digests in the store: they cannot be turned back.
        return []

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    # No ping: LMCache's health monitor would switch its local cache off too while the server is away.

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(self, keys: Sequence[Any]) -> Buffers:
        buffers = [self._allocate() for _ in keys]
        wanted = [number for number, buffer in enumerate(buffers) if buffer is not None]
        chunks = [self._chunk(keys[number], bytes_of(buffers[number])) for number in wanted]
        loading = self._store.load(chunks)
        try:
            sizes = await asyncio.wrap_future(loading)
        except asyncio.CancelledError:
            # LMCache has lost its patience, but threads may still write.
            loading.add_done_callback(lambda _: _release(buffers))
            raise
        found: Buffers = [None] * len(keys)
        for number, size_bytes in zip(wanted, sizes, strict=True):
            found[number] = self._loaded(buffers[number], size_bytes)
        return found

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(self, keys: Sequence[Any], memory_objs: Sequence[Any]) -> None:
        # LMCache holds the buffers until this returns.
        chunks = [self._chunk(key, bytes_of(one)) for key, one in zip(keys, memory_objs, strict=True)]
        await asyncio.wrap_future(self._store.store(chunks))

    async def batched_async_contains(self, lookup_id: str, keys: Sequence[Any], pin: bool = False) -> int:
        return _leading(await asyncio.wrap_future(self._find(keys)))

    async def batched_get_non_blocking(self, lookup_id: str, keys: Sequence[Any]) -> Buffers:
        found = await self.batched_get(keys)
        end = found.index(None) if None in found else len(found)
        _release(found[end:])
        return found[:end]

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: Sequence[Any]) -> int:
        return _leading(self._find(keys).result())

    def remove_sync(self, key: Any) -> bool:
        return self._store.delete(self._keys([key])).result()

    def _flush(self) -> None:
        """Take over the puts that wait on LMCache's event loop, and see them through."""
        with suppress(RuntimeError, TimeoutError):
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(_LOOP_S)
        self._close()

    def _close(self) -> None:
        self._store.close()
        COUNTS.remove(self._store)

    def _full_shape(self, options: LMCacheOptions) -> Shape:
        """What a whole chunk is."""
        described = zip(self.meta_shapes, self.meta_dtypes, strict=True)
        parts = tuple((tuple(dims), name_of(dtype)) for dims, dtype in described)
        kind = SinglePlane.LATENT if self.meta_fmt is MemoryFormat.KV_MLA_FMT else options.single_plane
        heads, head_dim = self._metadata.kv_shape[3:]
        known = len(parts) == 1 and parts[0][0][-1] == heads * head_dim
        return Shape(parts, kind, head_dim if known and kind is not SinglePlane.LATENT else 0)

    @staticmethod
    def _shard(of: Any) -> Shard:
        return Shard(of.model_name, of.worker_id, of.world_size)

    def _codec(self, key: Any) -> Codec:
        return self._codecs.of(self._shard(key), self._shape)

    def _keys(self, keys: Sequence[Any]) -> Sequence[ChunkKey]:
        return [_engine_key(self._codec(key), key) for key in keys]

    def _find(self, keys: Sequence[Any]) -> "Future[Rows]":
        codec = self._codec(keys[0]) if keys else None
        return self._store.find([self._keys(keys)], codec=codec)

    def _chunk(self, key: Any, data: memoryview) -> Chunk:
        codec = self._codec(key)
        return Chunk(_engine_key(codec, key), codec, data)

    def _allocate(self) -> Any:
        return self._memory.allocate(self.meta_shapes, self.meta_dtypes, self.meta_fmt)

    def _loaded(self, buffer: Any, size_bytes: int) -> Any:
        """A buffer that was loaded, cut to the tokens that are in it; None and given back where it was not."""
        try:
            return self.reshape_partial_chunk(buffer, size_bytes)
        except ValueError as exc:
            if size_bytes:
                log.warning("a chunk of %d bytes does not hold whole tokens: %s", size_bytes, exc)
            _release([buffer])
            return None


def _engine_key(codec: Codec, key: Any) -> ChunkKey:
    """Key of a chunk from the text of a `CacheEngineKey`: model, world size, worker, hash, dtype and tags."""
    return codec.key(b"engine", key.to_string().encode())


def _before(owner: Any, name: str, first: Callable[[], None]) -> None:
    """Make a method of one instance call something else first."""
    method = getattr(owner, name)

    def both() -> Any:
        first()
        return method()

    setattr(owner, name, both)


def _leading(found: list[list[bool]]) -> int:
    [row] = found
    return row.index(False) if False in row else len(row)


def _release(buffers: Sequence[Any]) -> None:
    for buffer in buffers:
        if buffer is not None:
            buffer.ref_count_down()
