"""What the faces of the LMCache connector do with a server: look up, load and store chunks, on a thread of their own.

The engine's threads and event loops only hand work over and get a future. The event loop here owns the client; chunks
are encoded and decoded in a few more threads, straight from and into the engine's buffers. A buffer is never touched
once its future is done. Failures are misses and are counted; none reaches the engine as an exception.
"""

import asyncio
import contextlib
import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple, TypeVar

from kvstore.backend import Ack, Backend, Copy, Match, Miss, Outcome, Reason
from kvstore.backends.host import HostBackend
from kvstore.client import Client
from kvstore.codecs import Pipeline
from kvstore.connectors.background import Background, BoundedBytes, codec_threads
from kvstore.connectors.guard import Guard
from kvstore.connectors.lmcache_calls import Calls
from kvstore.connectors.lmcache_chunks import Chunk, Codec, batches
from kvstore.connectors.lmcache_options import LMCacheOptions, Role
from kvstore.connectors.lmcache_plans import Plans
from kvstore.errors import AuthError, ConfigError, KVStoreError
from kvstore.frame import Frame
from kvstore.keys import NAMESPACE_BYTES, ChunkKey, chunk_key
from kvstore.plan import Action, Plan
from kvstore.stopwatch import Stopwatch
from kvstore.tiers import TieredBackend

_CONCURRENCY = 4
_START_S = 10.0
_CLOSE_S = 10.0
_PROBE_KEY = chunk_key(bytes(NAMESPACE_BYTES), hashlib.sha256(b"kvstore lmcache probe").digest())

log = logging.getLogger(__name__)

T = TypeVar("T")


def open_backend(options: LMCacheOptions) -> Backend:
    """The server, behind a local tier where the options ask for one.

    Raises:
        ConfigError: The URL is none.
    """
    client = Client(options.url, token=options.token, timeout_s=options.store_timeout_s)
    if not options.local_memory_bytes:
        return client
    return TieredBackend([HostBackend(options.local_memory_bytes), client])


class _Loaded(NamedTuple):
    """Of a fetched chunk: bytes written to its buffer, 0 for a miss, bytes that the link was busy with, and when."""

    size_bytes: int
    moved_bytes: int
    arrived_s: float = 0.0


class ChunkStore:
    """Looks up, loads and stores chunks for an engine.

    Args:
        options: The connector's options.
        open_with: Opens the backend; called on the event loop's thread.

    Raises:
        ConfigError: The backend cannot be opened, or `fail_open` is off and the server cannot be used.
    """

    def __init__(self, options: LMCacheOptions, open_with: Callable[[LMCacheOptions], Backend] = open_backend) -> None:
        self.options = options
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._queued = BoundedBytes(options.queue_bytes)
        self._calls = Calls(self._count)
        self._guard = Guard(prefill_tokens_per_s=options.prefill_tokens_per_s)
        self._pending: set[Future[Any]] = set()
        self._closing = False
        self._threads = codec_threads(options.threads, "kvstore-chunks-codec")
        self._background = Background("kvstore-chunks")
        self._gate = asyncio.Semaphore(_CONCURRENCY)
        self._plans: Plans | None = None
        try:
            self._backend = self._background.submit(self._open(open_with)).result()
            self._check_server()
        except BaseException:
            self.close()
            raise

    async def _open(self, open_with: Callable[[LMCacheOptions], Backend]) -> Backend:
        self._loop = asyncio.get_running_loop()
        backend = open_with(self.options)
        client = backend.tiers[-1] if isinstance(backend, TieredBackend) else backend
        if self.options.plan and isinstance(client, Client):
            self._plans = Plans(client, self.options)
        return backend

    def _check_server(self) -> None:
        probe = self.probe()
        if self.options.fail_open:
            probe.add_done_callback(lambda done: self._tell(done.result()))
        elif (problem := probe.result()) is not None:
            raise ConfigError(problem)

    @staticmethod
    def _tell(problem: str | None) -> None:
        if problem is not None:
            log.error("the engine runs without kvstore until this is mended: %s", problem)

    # What the engine's threads call.

    def probe(self) -> "Future[str | None]":
        """Why the server cannot be used and what to do, None where it can."""
        return self._submit(self._probe(), "the connector is closed")

    def find(
        self, rows: Sequence[Sequence[ChunkKey]], *, codec: Codec | None = None, gaps: bool = False
    ) -> "Future[list[list[bool]]]":
        """Which chunks are held and worth fetching.

        Args:
            rows: Keys of the prompt's chunks in order, a row for every shard or object group.
            codec: Codec of the chunks, None where unknown; then every chunk is worth it.
            gaps: Whether a chunk counts even where one before it in its row is missing; otherwise a row is not
                looked at behind its first gap.
        """
        return self._submit(self._find(rows, codec, gaps), [[False] * len(row) for row in rows])

    def load(self, chunks: Sequence[Chunk]) -> "Future[list[int]]":
        """Fetch chunks into their buffers: the bytes written to each, 0 where it is a miss."""
        return self._submit(self._load(chunks), [0] * len(chunks))

    def store(self, chunks: Sequence[Chunk]) -> "Future[list[Outcome]]":
        """Encode and put chunks; answers when their buffers are free again and the server has what it took."""
        size_bytes = sum(len(chunk.data) for chunk in chunks)
        refused = [Outcome.FAILED] * len(chunks)
        if self.options.role is Role.CONSUMER:
            return _done(refused)
        if not self._queued.take(size_bytes):
            self._count("dropped_chunks", len(chunks))
            return _done(refused)
        future = self._submit(self._store(chunks), refused)
        future.add_done_callback(lambda _: self._queued.give(size_bytes))
        return future

    def delete(self, keys: Sequence[ChunkKey]) -> "Future[bool]":
        """Forget chunks: whether the server did."""
        return self._submit(self._delete(keys), False)

    def status(self) -> dict[str, Any]:
        """Whether the server answers, what is under way (calls of the engine, tasks in all), and what was counted."""
        with self._lock:
            counts = dict(sorted(self.counts.items()))
            return {
                "is_healthy": self._calls.breaker.closed and not self._closing,
                "detail": self._calls.breaker.reason,
                "url": self.options.url,
                "queued_bytes": self._queued.used_bytes,
                "calls": len(self._pending),
                "tasks": len(asyncio.all_tasks(self._loop)),
                **counts,
            }

    def close(self) -> None:
        """Give stores under way `flush_timeout_s`, then end everything; safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            pending = set(self._pending)
        wait(pending, self.options.flush_timeout_s)
        if hasattr(self, "_backend"):
            self._background.submit(self._close_backend()).result()
        self._background.close(_CLOSE_S)
        self._threads.shutdown(wait=True)

    # What runs on the event loop's thread.

    def _submit(self, work: Coroutine[Any, Any, T], otherwise: T) -> "Future[T]":
        """Run a coroutine on the event loop; its future cannot be cancelled, as threads may be at work on buffers."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            running = None if self._closing else self._background.submit(work)
            if running is not None:
                self._pending.add(future)
        if running is None:
            work.close()
            future.set_result(otherwise)
        else:
            # Not under the lock: what is done already calls back at once, from here.
            running.add_done_callback(lambda done: self._settle(future, done, otherwise))
        return future

    def _settle(self, future: "Future[T]", done: "Future[T]", otherwise: T) -> None:
        answer = otherwise
        if not done.cancelled():
            if (error := done.exception()) is None:
                answer = done.result()
            else:
                # A mistake of ours must not leave the engine waiting.
                self._count("internal_errors")
                log.error("the connector failed", exc_info=error)
        self._pending.discard(future)
        future.set_result(answer)

    async def _probe(self) -> str | None:
        try:
            async with asyncio.timeout(_START_S):
                await self._backend.match([_PROBE_KEY])
        except AuthError as exc:
            return f"token: {self.options.url} refuses it ({exc}); set token or KVSTORE_TOKEN to the server's"
        except (KVStoreError, TimeoutError) as exc:
            return f"url: {self.options.url} does not answer ({exc or 'timeout'}); start it with 'kvstore serve'"
        return None

    async def _find(self, rows: Sequence[Sequence[ChunkKey]], codec: Codec | None, gaps: bool) -> list[list[bool]]:
        nothing = [[False] * len(row) for row in rows]
        if self.options.role is Role.PRODUCER:
            return nothing
        deadline = _now() + self.options.lookup_deadline_s
        found = list(await asyncio.gather(*(self._leading(row, deadline, codec) for row in rows)))
        if gaps:
            for row, copies in zip(rows, found, strict=True):
                rest = range(copies.index(None) + 1 if None in copies else len(copies), len(copies))
                answers = await asyncio.gather(*(self._leading([row[number]], deadline) for number in rest))
                for number, [answer] in zip(rest, answers, strict=True):
                    copies[number] = answer
        held = [[copy is not None for copy in copies] for copies in found]
        worth = self._worth(rows, found, codec)
        self._count("found_chunks" if worth else "refused_chunks", sum(map(sum, held)))
        return held if worth else nothing

    async def _leading(
        self, keys: Sequence[ChunkKey], deadline: float, codec: Codec | None = None
    ) -> list[Copy | None]:
        match: Match | Miss
        if self._plans is not None and codec is not None and codec.layout is not None and keys:
            plans = self._plans
            planned = await self._calls.ask(lambda: plans.match(keys, codec), deadline)
            match = planned if isinstance(planned, Miss) else planned[1]
        else:
            match = await self._calls.ask(lambda: self._backend.match(keys), deadline)
        if isinstance(match, Miss):
            self._count(f"missed_{match.reason}_chunks", len(keys))
            return [None] * len(keys)
        copies: list[Copy | None] = [held.copy for held in match.held]
        return copies + [None] * (len(keys) - len(copies))

    def _worth(
        self, rows: Sequence[Sequence[ChunkKey]], found: Sequence[Sequence[Copy | None]], codec: Codec | None
    ) -> bool:
        """Whether fetching these copies is expected to be faster than computing their tokens, once for all rows."""
        plans = [self._plans.of(row[0]) for row in rows if row] if self._plans is not None else []
        if any(plan.action is not Action.STATIC for plan in plans):
            return all(plan.action is not Action.RECOMPUTE for plan in plans)
        held = [[copy for copy in row if copy is not None] for row in found]
        tokens = max(map(len, held), default=0) * (0 if codec is None else codec.chunk_tokens)
        end = None if self.options.level is None else self.options.level + 1
        size_bytes = sum(copy.head_bytes + sum(copy.level_bytes[:end]) for row in held for copy in row)
        return not (self.options.prefill_tokens_per_s and tokens) or self._guard.worth(tokens, size_bytes)

    async def _load(self, chunks: Sequence[Chunk]) -> list[int]:
        started_s = _now()
        deadline = started_s + self.options.deadline_s
        decoding = Stopwatch()
        parts = await asyncio.gather(*(self._load_batch(batch, deadline, decoding) for batch in batches(chunks)))
        loaded = [one for part in parts for one in part]
        moved_bytes, took_s = sum(one.moved_bytes for one in loaded), _now() - started_s
        self._guard.observe_fetch(moved_bytes, took_s)
        if self._plans is not None and chunks and all(one.size_bytes for one in loaded):
            arrived_s = max(one.arrived_s for one in loaded) - started_s
            self._plans.loaded(chunks[0].key, moved_bytes, took_s, arrived_s, decoding.total_s)
        return [one.size_bytes for one in loaded]

    async def _load_batch(self, chunks: Sequence[Chunk], deadline: float, decoding: Stopwatch) -> list[_Loaded]:
        keys = [chunk.key for chunk in chunks]
        plan = Plan(Action.STATIC) if self._plans is None else self._plans.of(keys[0])
        level = self.options.level if plan.action is Action.STATIC else plan.level

        async def get() -> list[Frame | Miss]:
            async with self._gate:
                return await self._backend.get(keys, level=level)

        answers = await self._calls.ask(get, deadline)
        if isinstance(answers, Miss):
            answers = [answers] * len(chunks)
        arrived_s = _now()
        # No deadline from here on: what a thread has begun to write it must end before the buffer is given back.
        with decoding:
            loaded = await asyncio.gather(*map(self._decode, chunks, answers))
        return [one._replace(arrived_s=arrived_s) for one in loaded]

    async def _decode(self, chunk: Chunk, answer: Frame | Miss) -> _Loaded:
        if isinstance(answer, Miss):
            self._count(f"missed_{answer.reason}_chunks")
            # What did not come in time is as many bytes that took this long; what is not there costs nothing.
            return _Loaded(0, len(chunk.data) if answer.reason is Reason.DEADLINE else 0)
        artefacts = {} if self._plans is None else self._plans.artefacts
        decoded = await self._in_thread(chunk.codec.decode, chunk.key, answer, chunk.data, artefacts)
        if isinstance(decoded, Miss):
            self._count(f"missed_{decoded.reason}_chunks")
            return _Loaded(0, answer.size_bytes)
        self._count("loaded_chunks")
        self._count("loaded_bytes", decoded)
        self._count("received_bytes", answer.size_bytes)
        return _Loaded(decoded, answer.size_bytes)

    async def _store(self, chunks: Sequence[Chunk]) -> list[Outcome]:
        held = (await self._find_whole(chunks)) if len(chunks) else 0
        outcomes = [Outcome.EXISTS] * held
        for batch in batches(chunks[held:]):
            outcomes += await self._store_batch(batch)
        return outcomes

    async def _find_whole(self, chunks: Sequence[Chunk]) -> int:
        """How many leading chunks need not be encoded, as all of them is held."""
        deadline = _now() + self.options.deadline_s
        match = await self._calls.ask(lambda: self._backend.match([chunk.key for chunk in chunks]), deadline)
        if isinstance(match, Miss):
            return 0
        whole = [held.copy.whole and not held.copy.inexact for held in match.held]
        return whole.index(False) if False in whole else len(whole)

    async def _store_batch(self, chunks: Sequence[Chunk]) -> list[Outcome]:
        frames: list[tuple[ChunkKey, Frame]] = []
        encoded: list[int] = []
        pipeline, plan = await self._planned(chunks)
        began_s = _now()
        for number, chunk in enumerate(chunks):
            try:
                frame = await self._in_thread(chunk.codec.encode, chunk.key, chunk.data, pipeline)
            except KVStoreError as exc:
                log.warning("a chunk cannot be encoded: %s", exc)
                continue
            frames.append((chunk.key, frame))
            encoded.append(number)
        encoded_s = _now()
        deadline = encoded_s + self.options.store_timeout_s
        answers = await self._calls.ask(lambda: self._backend.put(frames, ack=Ack.MEMORY), deadline)
        if self._plans is not None and not isinstance(answers, Miss):
            size_bytes = sum(frame.size_bytes for _, frame in frames)
            self._plans.stored(plan, size_bytes, encoded_s - began_s, _now() - encoded_s)
        outcomes = [Outcome.FAILED] * len(chunks)
        if not isinstance(answers, Miss):
            for number, (_, frame), stored in zip(encoded, frames, answers, strict=True):
                outcomes[number] = stored.outcome
                if stored.outcome in (Outcome.WRITTEN, Outcome.EXTENDED):
                    self._count("stored_chunks")
                    self._count("sent_bytes", frame.size_bytes)
        self._count("failed_chunks", outcomes.count(Outcome.FAILED))
        return outcomes

    async def _planned(self, chunks: Sequence[Chunk]) -> tuple[Pipeline | None, Plan]:
        """How to encode chunks; no pipeline where that is as configured."""
        plans, codec = self._plans, chunks[0].codec
        if plans is None or codec.layout is None:
            return None, Plan(Action.STATIC)
        deadline = _now() + self.options.lookup_deadline_s
        planned = await self._calls.ask(lambda: plans.pipeline(codec, len(chunks)), deadline)
        return (None, Plan(Action.STATIC)) if isinstance(planned, Miss) else planned

    async def _delete(self, keys: Sequence[ChunkKey]) -> bool:
        deadline = _now() + self.options.deadline_s
        return not isinstance(await self._calls.ask(lambda: self._backend.delete(keys), deadline), Miss)

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        """What a call in a thread returns; when this is cancelled it still waits, for the sake of the buffers."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise

    async def _close_backend(self) -> None:
        with contextlib.suppress(KVStoreError, OSError):
            await self._backend.aclose()

    def _count(self, name: str, amount: int = 1) -> None:
        if amount:
            with self._lock:
                self.counts[name] += amount


def _done(answer: T) -> "Future[T]":
    future: Future[T] = Future()
    future.set_result(answer)
    return future


def _now() -> float:
    return asyncio.get_running_loop().time()
