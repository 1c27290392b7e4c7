"""Frames in an LMDB environment under a byte budget: one write transaction a batch, durable when it commits.

The index lives in memory and on the event loop; `LmdbStore` does the reading and writing, in threads.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kvstore.backend import Ack, Held, Match, Miss, Outcome, Reason, Stored, put_outcome
from kvstore.backends.index import Index, Move, held_from, shortened
from kvstore.backends.lmdb_environment import MapFullError
from kvstore.backends.lmdb_records import size_on_disk_bytes
from kvstore.backends.lmdb_store import SLACK_BYTES, LmdbStore, Wanted
from kvstore.backends.policies import Policies
from kvstore.errors import BackendError, BackendFullError, BackendUnavailableError, ConfigError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics

_READERS = 4
_TRANSACTION_BYTES_MAX = 64 << 20
_FREED_BYTES_MAX = 256 << 20
"""Bytes that one transaction may free, as LMDB notes its free pages in one run of pages."""
_PRESSURE_SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.1, 0.1, 0.1)
"""Shares of the budget that are given up, one after another, while the map is full."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class LmdbBackend:
    """Frames on disk. Create it with `open`.

    The file never grows beyond `1.25 * budget + 64 MiB`: the budget counts whole pages, the rest is room for pages
    that LMDB cannot reuse yet.

    Attributes:
        map_full: How often LMDB found no room for a transaction, which was then made in smaller steps.
    """

    def __init__(self, store: LmdbStore, index: Index, metrics: Metrics, policies: Policies) -> None:
        self.name = index.tier
        self._store = store
        self._index = index
        self._metrics = metrics
        self._policies = policies
        self._writing = asyncio.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kvstore-lmdb-write")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="kvstore-lmdb-read")
        self._changes: set[asyncio.Task[Any]] = set()
        self._closed = False
        self.map_full = 0
        # Pages that a transaction frees can be used by the next but one, so room for three must be there.
        room_bytes = index.budget_bytes // 4 + SLACK_BYTES
        self._transaction_bytes_max = min(_TRANSACTION_BYTES_MAX, room_bytes // 4, index.budget_bytes // 4)
        metrics.budget_bytes.labels(self.name).set(index.budget_bytes)
        self._gauge()

    @classmethod
    async def open(
        cls,
        directory: Path,
        budget_bytes: int,
        *,
        metrics: Metrics | None = None,
        policies: Policies | None = None,
        name: str = "lmdb",
    ) -> "LmdbBackend":
        """Open or create the environment and load its index.

        Raises:
            ConfigError: The directory cannot be used, is in use, or has another format.
        """
        policies = policies or Policies()
        index = Index(name, budget_bytes, measure=size_on_disk_bytes, policies=policies)
        store = await asyncio.to_thread(LmdbStore, directory, budget_bytes, name)
        backend = cls(store, index, metrics or Metrics(), policies)
        try:
            await backend._load()
        except BaseException as exc:
            await backend.aclose()
            if isinstance(exc, BackendError):
                raise ConfigError(f"cannot open the disk tier in {directory}: {exc}") from exc
            raise
        return backend

    async def _load(self) -> None:
        place: bytes | None = b""
        while place is not None:
            loaded, place = await self._run(self._writer, partial(self._store.load, place))
            for key, held, origin in loaded:
                self._index.add(key, held, size_on_disk_bytes(held.copy), origin)
        # The budget may be smaller than it was when these chunks were written.
        excess = self._index.release(self._index.used_bytes - self._index.budget_bytes)
        for moves in _runs(excess, lambda move: move.before_bytes):
            await self._run(self._writer, partial(self._store.write, [], moves))
        self._gauge()

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        return self._index.match(keys)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        wanted = [Wanted(key, held, _levels(held, level)) for key in keys if (held := self._index.get(key))]
        read = await self._run(self._readers, lambda: self._store.read(wanted)) if wanted else []
        found = {want.key: (want, frame) for want, frame in zip(wanted, read, strict=True)}
        return [await self._judge(*found[key], level) if key in found else self._index.miss(key) for key in keys]

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.DISK) -> list[Stored]:
        async def put() -> list[Stored]:
            return [stored for batch in self._batches(items) for stored in await self._put_batch(batch)]

        return await self._to_the_end(put)

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        async def trim() -> None:
            held = {key: self._index.get(key) for key in keys}
            shorter = {
                key: shortened(found, level + 1)
                for key, found in held.items()
                if found is not None and len(found.copy.level_bytes) > level + 1
            }
            for run in _runs(shorter.items(), lambda item: sum(item[1].copy.level_bytes)):
                await self._run(self._writer, partial(self._store.trim, dict(run)))
                for key, found in run:
                    self._index.add(key, found, size_on_disk_bytes(found.copy), self._index.origin(key))

        await self._to_the_end(trim)

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        async def delete() -> None:
            for run in _runs(keys, self._size_bytes):
                await self._run(self._writer, partial(self._store.delete, run))
                for key in run:
                    self._index.drop(key, Reason.ABSENT)

        await self._to_the_end(delete)

    async def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        for key, held in self._index.scan(namespace):
            yield key, held

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        async with self._writing:
            await asyncio.to_thread(self._readers.shutdown)
            await asyncio.to_thread(self._writer.shutdown)
            self._store.close()

    async def _judge(self, want: Wanted, frame: Frame | None, level: int | None) -> Frame | Miss:
        """A frame that was read, or the miss that it amounts to."""
        if frame is not None:
            self._index.read(want.key)
            return frame

        async def take_away() -> bool:
            if self._index.get(want.key) is not want.held:
                # It was trimmed, replaced, deleted or evicted while it was read.
                return False
            self._index.drop(want.key, Reason.CORRUPT)
            self._metrics.corrupt.labels(self.name).inc()
            try:
                await self._run(self._writer, lambda: self._store.quarantine(want.key))
            except BackendError as exc:
                log.warning("a damaged chunk could not be taken out of %s: %s", self.name, exc)
            return True

        damaged = await self._to_the_end(take_away)
        return Miss(Reason.CORRUPT) if damaged else (await self.get([want.key], level=level))[0]

    async def _to_the_end(self, change: Callable[[], Awaitable[T]]) -> T:
        """Make a change while nobody else makes one, and to its end even if the caller is cancelled meanwhile.

        A thread that has begun a transaction cannot be stopped, and the index must say what became of it.
        """

        async def alone() -> T:
            async with self._writing:
                try:
                    return await change()
                finally:
                    self._gauge()

        task = asyncio.create_task(alone())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    def _batches(self, items: Sequence[tuple[ChunkKey, Frame]]) -> Iterator[dict[ChunkKey, Frame]]:
        """Cut a put into transactions: no key twice, and room for each beside what stays."""
        batch: dict[ChunkKey, Frame] = {}
        batch_bytes = 0
        for key, frame in items:
            size_bytes = size_on_disk_bytes(held_from(self.name, frame).copy)
            if key in batch or batch_bytes + size_bytes > self._transaction_bytes_max:
                yield batch
                batch, batch_bytes = {}, 0
            batch[key] = frame
            batch_bytes += size_bytes
        yield batch

    async def _put_batch(self, batch: dict[ChunkKey, Frame]) -> list[Stored]:
        outcomes = {key: put_outcome(self._index.get(key), frame) for key, frame in batch.items()}
        fresh = {}
        for key, frame in batch.items():
            if outcomes[key] in (Outcome.WRITTEN, Outcome.EXTENDED):
                fresh[key] = self._placed(key, frame)
                if (
                    outcomes[key] is Outcome.EXTENDED
                    and put_outcome(self._index.get(key), fresh[key]) is Outcome.EXISTS
                ):
                    # There is no room for what it would add.
                    del fresh[key]
        error = await self._write(fresh) if fresh else None
        return [
            Stored(Outcome.FAILED, None, error) if error and key in fresh else Stored(outcomes[key], Ack.DISK)
            for key in batch
        ]

    def _placed(self, key: ChunkKey, frame: Frame) -> Frame:
        """The levels of a frame that this tier keeps now."""
        held = held_from(self.name, frame)
        return frame.truncated(self._index.placed(key, held, size_on_disk_bytes(held.copy)) - 1)

    async def _write(self, fresh: dict[ChunkKey, Frame]) -> BackendError | None:
        """Write frames in one transaction, giving up more chunks while the map is full."""
        held = {key: held_from(self.name, frame) for key, frame in fresh.items()}
        sizes_bytes = {key: size_on_disk_bytes(found.copy) for key, found in held.items()}
        try:
            error = await self._try_write(fresh, self._index.make_room(sizes_bytes))
        except BackendFullError as exc:
            return exc
        for share in _PRESSURE_SHARES:
            if not isinstance(error, MapFullError):
                break
            self.map_full += 1
            # Pages may be fragmented, or not free before further transactions: make room in transactions of its own.
            give_up_bytes = max(sum(sizes_bytes.values()), int(share * self._index.budget_bytes))
            moves = self._index.release(give_up_bytes, keep=fresh) if share else self._index.make_room(sizes_bytes)
            error = await self._try_write({}, moves) or await self._settle() or await self._try_write(fresh, [])
        if error is None:
            for key, found in held.items():
                self._index.add(key, found, sizes_bytes[key], self._policies.origin(key, fresh[key]))
        return error

    async def _try_write(self, fresh: dict[ChunkKey, Frame], moves: list[Move]) -> BackendError | None:
        items = [(key, frame, self._policies.origin(key, frame)) for key, frame in fresh.items()]
        try:
            await self._run(self._writer, lambda: self._store.write(items, moves))
        except BackendError as exc:
            # The transaction was undone, so what was to go is still there.
            self._index.undo(moves)
            return exc
        evicted = sum(move.after is None for move in moves)
        self._metrics.evictions.labels(self.name).inc(evicted)
        self._metrics.shrinks.labels(self.name).inc(len(moves) - evicted)
        return None

    async def _settle(self) -> BackendError | None:
        try:
            await self._run(self._writer, self._store.settle)
        except BackendError as exc:
            return exc
        return None

    async def _run(self, executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, work)
        except RuntimeError as exc:
            raise BackendUnavailableError(self.name, "is closed") from exc

    def _size_bytes(self, key: ChunkKey) -> int:
        """Bytes that deleting a chunk frees."""
        held = self._index.get(key)
        return 0 if held is None else size_on_disk_bytes(held.copy)

    def _gauge(self) -> None:
        self._metrics.chunks.labels(self.name).set(len(self._index))
        self._metrics.used_bytes.labels(self.name).set(self._index.used_bytes)


def _levels(held: Held, level: int | None) -> int:
    """Number of levels to read of a chunk."""
    levels = len(held.copy.level_bytes)
    return levels if level is None else min(levels, level + 1)


def _runs(items: Iterable[T], size_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut what is to be deleted into transactions."""
    run: list[T] = []
    freed_bytes = 0
    for item in items:
        if run and freed_bytes + size_bytes(item) > _FREED_BYTES_MAX:
            yield run
            run, freed_bytes = [], 0
        run.append(item)
        freed_bytes += size_bytes(item)
    yield run
