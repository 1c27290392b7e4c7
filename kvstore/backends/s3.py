"""Frames in a bucket of S3 or of any server that speaks its protocol: unbounded, durable, shared and far away.

The index lives in memory and on the event loop, so `match` never asks S3. It is rebuilt in the background at start;
until that is done, chunks that it does not know are looked for in the bucket. `S3Store` does the requests, in threads.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvstore.backend import Ack, Held, Match, Miss, Outcome, Reason, State, Stored, put_outcome
from kvstore.backends.breaker import Breaker
from kvstore.backends.index import held_from
from kvstore.backends.s3_calls import (
    AbsentError,
    Calls,
    ChangedError,
    DamagedError,
    Deadline,
    DeadlineError,
    ForeignError,
)
from kvstore.backends.s3_index import S3Index
from kvstore.backends.s3_locks import KeyLocks
from kvstore.backends.s3_rebuild import Rebuild
from kvstore.backends.s3_settings import S3Settings
from kvstore.backends.s3_write import write_frame
from kvstore.errors import BackendError, BackendFullError, BackendUnavailableError, ConfigError
from kvstore.frame import Frame
from kvstore.header import LEVELS_MAX
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics

if TYPE_CHECKING:
    from kvstore.backends.s3_body import Found
    from kvstore.backends.s3_store import Listed, S3Store

__all__ = ["S3Backend", "S3Settings"]

_GUESS_BYTES = 16 << 10
_DELETE_KEYS_MAX = 1000
_WRITE_TRIES = 4

log = logging.getLogger(__name__)


class S3Backend:
    """Frames in a bucket. Create it with `open`.

    Every method ends by the deadline of the settings. Changes of one chunk are made one after the other: one whose
    caller was answered at the deadline still ends before the next begins, and the index learns what became of it.

    Attributes:
        name: Name of the tier.
    """

    def __init__(self, settings: S3Settings, store: "S3Store", calls: Calls, metrics: Metrics, name: str) -> None:
        self.name = name
        self._settings = settings
        self._store = store
        self._calls = calls
        self._metrics = metrics
        self._index = S3Index()
        self._locks = KeyLocks()
        # Chunks of which S3 must be asked, whatever the index says: their heads could not be read, or a change of them
        # began and S3 did not say how it ended.
        self._unsure: set[ChunkKey] = set()
        # Counts deletes, so that a get which began before one does not bring back what it took away.
        self._removals = 0
        # Damaged objects that could not be taken away: the next put writes over them, whatever their heads say.
        self._damaged: set[ChunkKey] = set()
        self._rebuild = Rebuild(
            name,
            self._list_page,
            self._learn,
            self._index.__contains__,
            self._unsure,
            calls.available,
            settings.rebuild_threads,
        )
        self._background: list[asyncio.Task[None]] = []
        self._closed = False

    @classmethod
    async def open(cls, settings: S3Settings, *, metrics: Metrics | None = None, name: str = "s3") -> "S3Backend":
        """Find the bucket and begin to rebuild the index.

        An endpoint that does not answer is no error: the tier opens out of order and goes on trying, see `state`.

        Raises:
            ConfigError: boto3 is missing, the settings make no sense, or the bucket is not there or not ours.
        """
        try:
            from kvstore.backends.s3_store import S3Store
        except ModuleNotFoundError as exc:
            raise ConfigError(f"the s3 tier needs boto3 ({exc}): pip install 'kvstore[s3]'") from exc
        metrics = metrics or Metrics()
        breaker = Breaker(
            failures_max=settings.breaker_failures,
            cooldown_s=settings.breaker_cooldown_s,
            cooldown_max_s=settings.breaker_cooldown_max_s,
        )
        store = await asyncio.to_thread(S3Store, settings, name, metrics)
        calls = Calls(name, settings.threads, settings.rebuild_threads, breaker, metrics)
        backend = cls(settings, store, calls, metrics, name)
        try:
            await backend._find_bucket()
        except BaseException:
            await backend.aclose()
            raise
        backend._background = [
            asyncio.create_task(backend._rebuild.run(), name=f"kvstore-{name}-rebuild"),
            asyncio.create_task(calls.watch(store.find_bucket, settings.deadline_s), name=f"kvstore-{name}-watch"),
        ]
        return backend

    @property
    def state(self) -> State:
        """Whether S3 is asked, and what keeps it from being asked or from answering fully."""
        breaker = self._calls.breaker
        if self._closed:
            return State(False, "closed")
        if not breaker.closed:
            return State(False, f"breaker open: {breaker.reason}; next try in {math.ceil(breaker.retry_after_s)} s")
        if self._rebuild.done:
            return State(True)
        trouble = f"; last problem: {self._rebuild.problem}" if self._rebuild.problem else ""
        return State(True, f"rebuilding its index: {self._rebuild.seen:,} objects so far{trouble}")

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        return self._index.match(keys)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        levels_max = LEVELS_MAX if level is None else level + 1
        deadline = self._deadline()
        try:
            found = await self._calls.collect([self._get(key, levels_max, deadline) for key in keys], deadline)
        except asyncio.CancelledError:
            deadline.expire()
            raise
        return [_missed(answer) if isinstance(answer, BaseException) else answer for answer in found]

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.REMOTE) -> list[Stored]:
        deadline = self._deadline()
        stored = await self._calls.collect([self._put(key, frame, deadline) for key, frame in items], deadline)
        return [_failed(result) if isinstance(result, BaseException) else result for result in stored]

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        deadline = self._deadline()
        jobs = [self._trim(key, level + 1, deadline) for key in dict.fromkeys(keys)]
        _raise_first(await self._calls.collect(jobs, deadline))

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        deadline = self._deadline()
        unique = list(dict.fromkeys(keys))
        batches = [unique[start : start + _DELETE_KEYS_MAX] for start in range(0, len(unique), _DELETE_KEYS_MAX)]
        _raise_first(await self._calls.collect([self._delete(batch, deadline) for batch in batches], deadline))

    async def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        for key, held in self._index.scan(namespace):
            yield key, held

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if not await self._calls.aclose(self._settings.deadline_s):
            log.warning("%s was closed while calls were still waiting for S3", self.name)
        self._store.close()
        self._metrics.tier_up.labels(self.name).set(0)

    async def _find_bucket(self) -> None:
        try:
            await self._calls.run(self._store.find_bucket, self._deadline(), background=True)
        except BackendUnavailableError as exc:
            log.warning("%s is out of order and is tried again: %s", self.name, exc.detail)
            if self._calls.breaker.closed:
                self._calls.trip(exc.detail)

    async def _get(self, key: ChunkKey, levels_max: int, deadline: Deadline) -> Frame | Miss:
        held = self._index.get(key)
        if held is None and self._sure(key):
            return self._index.miss(key)
        removals = self._removals
        try:
            found = await self._read(key, held, levels_max, deadline)
        except AbsentError:
            return self._vanished(key, held)
        except ForeignError:
            return Miss(Reason.IDENTITY)
        except DamagedError as exc:
            async with self._locks.hold([key], deadline):
                await self._take_away(key, exc, deadline)
            return Miss(Reason.CORRUPT)
        if self._index.get(key) is held and (held is not None or self._removals == removals):
            self._learned(key, found.held)
        return found.frame

    async def _put(self, key: ChunkKey, frame: Frame, deadline: Deadline) -> Stored:
        size_bytes = frame.size_bytes
        if size_bytes > self._settings.frame_bytes_max:
            raise BackendFullError(self.name, f"{size_bytes} bytes are more than frame_bytes_max of the s3 tier")
        async with self._locks.hold([key], deadline):
            known, sure = self._index.get(key), self._sure(key)
            if known and sure and (outcome := put_outcome(known, frame)) in (Outcome.EXISTS, Outcome.OTHER):
                return Stored(outcome, Ack.REMOTE)
            try:
                # What is about to be replaced may have been changed by another server. And not every server minds
                # the condition that a chunk must be new, least of all for one in parts.
                new = sure and not known and size_bytes < self._settings.multipart_bytes
                return await self._put_over(key, frame, None if new else await self._look(key, deadline), deadline)
            except ForeignError:
                return Stored(Outcome.OTHER, Ack.REMOTE)

    async def _put_over(self, key: ChunkKey, frame: Frame, found: "Found | None", deadline: Deadline) -> Stored:
        """Write a frame where `found` lies, looking again whenever something else turns out to lie there."""
        for _ in range(_WRITE_TRIES):
            outcome = put_outcome(found.held if found else None, frame)
            if found and outcome in (Outcome.EXISTS, Outcome.OTHER):
                self._settled(key, found.held)
                return Stored(outcome, Ack.REMOTE)
            if await self._replace(key, frame, found, deadline):
                return Stored(outcome, Ack.REMOTE)
            found = await self._look(key, deadline)
        raise BackendUnavailableError(self.name, "a chunk is changed faster than it can be written")

    async def _trim(self, key: ChunkKey, levels: int, deadline: Deadline) -> None:
        async with self._locks.hold([key], deadline):
            for _ in range(_WRITE_TRIES):
                held = self._index.get(key)
                if self._sure(key) and (held is None or len(held.copy.level_bytes) <= levels):
                    return
                try:
                    found = await self._read(key, held, levels, deadline)
                except AbsentError:
                    self._vanished(key, held)
                    self._unsure.discard(key)
                    return
                except ForeignError:
                    return
                except DamagedError as exc:
                    await self._take_away(key, exc, deadline)
                    return
                self._settled(key, found.held)
                if len(found.held.copy.level_bytes) <= levels:
                    return
                if await self._replace(key, found.frame, found, deadline):
                    return
            raise BackendUnavailableError(self.name, "a chunk is changed faster than it can be trimmed")

    async def _delete(self, keys: Sequence[ChunkKey], deadline: Deadline) -> None:
        async with self._locks.hold(keys, deadline):
            work = partial(self._store.delete, keys)
            failed = set(await self._calls.run(work, deadline, begun=partial(self._unsure.update, keys)))
            self._removals += 1
            for key in keys:
                if key not in failed:
                    self._damaged.discard(key)
                    self._unsure.discard(key)
                    self._forget(key, Reason.ABSENT)
        if failed:
            raise BackendUnavailableError(self.name, f"{len(failed)} of {len(keys)} chunks could not be deleted")

    async def _read(
        self, key: ChunkKey, held: Held | None, levels_max: int, deadline: Deadline, *, background: bool = False
    ) -> "Found":
        """The frame of a chunk; where it is damaged, it has been read twice."""
        copy = None if held is None else held.copy
        guess_bytes = _GUESS_BYTES if copy is None else copy.head_bytes + sum(copy.level_bytes[:levels_max])
        work = partial(self._store.read, key, guess_bytes, levels_max)
        try:
            return await self._calls.run(work, deadline, background=background)
        except DamagedError:
            # Bytes that were changed on their way may be sound where they lie.
            return await self._calls.run(work, deadline, background=background)

    async def _look(self, key: ChunkKey, deadline: Deadline) -> "Found | None":
        """What lies under a key by its head; None where nothing does that need be kept."""
        if key in self._damaged:
            return None
        try:
            return await self._read(key, None, 0, deadline)
        except AbsentError:
            return None
        except DamagedError as exc:
            await self._take_away(key, exc, deadline)
            return None

    async def _replace(self, key: ChunkKey, frame: Frame, found: "Found | None", deadline: Deadline) -> bool:
        """Write a frame over what was found; False where that is no longer what lies there."""
        expected = None if key in self._damaged else "*" if found is None else found.etag
        try:
            await self._write(key, frame, expected, deadline)
        except ChangedError:
            now = await self._look(key, deadline)
            if (found and found.etag) != (now and now.etag):
                return False
            # Some servers take an object that nobody touched for a changed one.
            try:
                await self._write(key, frame, None, deadline)
            except ChangedError as exc:
                raise BackendUnavailableError(self.name, "S3 finds a write in conflict with another") from exc
        self._damaged.discard(key)
        self._settled(key, held_from(self.name, frame))
        return True

    async def _write(self, key: ChunkKey, frame: Frame, expected: str | None, deadline: Deadline) -> None:
        await write_frame(
            self._calls, self._store, self._settings, key, frame, expected, deadline, partial(self._unsure.add, key)
        )

    async def _take_away(self, key: ChunkKey, damage: DamagedError, deadline: Deadline) -> None:
        """Move a damaged object to the quarantine; its lock is held."""
        try:
            taken = await self._calls.run(lambda limit: self._store.quarantine(key, damage.etag, limit), deadline)
        except BackendError as exc:
            log.warning("%s: a damaged chunk could not be taken away: %s", self.name, exc.detail)
            taken = True
            self._damaged.add(key)
        if taken:
            log.warning("%s: %s is damaged: %s", self.name, key.hex(), damage)
            self._metrics.corrupt.labels(self.name).inc()
            self._forget(key, Reason.CORRUPT)

    async def _list_page(self, token: str | None) -> "Listed":
        return await self._calls.run(partial(self._store.list_page, token), self._deadline(), background=True)

    async def _learn(self, key: ChunkKey) -> None:
        """Read the head of a frame that was listed."""
        deadline = self._deadline()
        async with self._locks.hold([key], deadline):
            if key not in self._index and key not in self._damaged:
                self._settled(key, (await self._read(key, None, 0, deadline, background=True)).held)

    def _deadline(self) -> Deadline:
        """The deadline of a call that begins now."""
        if self._closed:
            raise BackendUnavailableError(self.name, "is closed")
        return Deadline(self.name, self._settings.deadline_s)

    def _sure(self, key: ChunkKey) -> bool:
        """Whether the index knows of a chunk what there is to know."""
        return key not in self._unsure and (key in self._index or self._rebuild.done)

    def _settled(self, key: ChunkKey, held: Held) -> None:
        """Note what a chunk's object holds; its lock is held, so nothing else is under way."""
        self._learned(key, held)
        self._unsure.discard(key)

    def _learned(self, key: ChunkKey, held: Held) -> None:
        # What is damaged below a sound head must not count as held.
        if key not in self._damaged and held != self._index.get(key):
            self._index.add(key, held)
            self._gauge()

    def _forget(self, key: ChunkKey, reason: Reason) -> None:
        self._index.drop(key, reason)
        self._gauge()

    def _vanished(self, key: ChunkKey, held: Held | None) -> Miss:
        """The miss of a chunk that S3 does not have: its lifecycle rules or another server took it."""
        if held is not None and self._index.get(key) is held:
            self._forget(key, Reason.EVICTED)
        return self._index.miss(key)

    def _gauge(self) -> None:
        self._metrics.chunks.labels(self.name).set(len(self._index))
        self._metrics.used_bytes.labels(self.name).set(self._index.used_bytes)


def _missed(error: BaseException) -> Miss:
    if isinstance(error, DeadlineError):
        return Miss(Reason.DEADLINE)
    if isinstance(error, BackendError):
        return Miss(Reason.BREAKER)
    raise error


def _failed(error: BaseException) -> Stored:
    if isinstance(error, BackendError):
        return Stored(Outcome.FAILED, None, error)
    raise error


def _raise_first(results: Iterable[object]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result
