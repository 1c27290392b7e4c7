"""A backend in front of a slow one: puts that need not wait are queued in memory and written in batches.

The queue is bounded; when it is full a put is refused with `BackendBusyError`, so memory never grows without limit.
While the slow backend is down the queue waits for it, and once it is full puts go past it, so that an outage below does
not stop what is above. What is queued is visible like everything else, and `aclose` writes it out within a deadline.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from kvstore.backend import Ack, Backend, Held, Match, Miss, Outcome, State, Stored, put_outcome, state_of
from kvstore.backends.index import held_from
from kvstore.errors import BackendBusyError, BackendUnavailableError
from kvstore.frame import Frame
from kvstore.keys import NAMESPACE_BYTES, ChunkKey
from kvstore.metrics import Metrics

_BATCH_BYTES = 64 << 20
_PAUSE_S = 0.1
_PAUSE_MAX_S = 5.0

log = logging.getLogger(__name__)


class WriteBehind:
    """Wraps a backend whose puts are durable but slow.

    Args:
        inner: The backend that is written to; this wrapper owns and closes it.
        inner_ack: Durability of a put that `inner` has answered.
        waits_for: Least durability asked for that a put waits for `inner`; `inner_ack` by default.
        queue_bytes_max: Bytes that may wait, at most what `inner` can hold; a larger batch is written before it is
            answered.
        batch_bytes: Bytes that are written at one time; a delete waits for them.
        flush_timeout_s: Time that `aclose` gives what is queued.
        metrics: Where to count; its own by default.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        inner_ack: Ack = Ack.DISK,
        waits_for: Ack | None = None,
        queue_bytes_max: int = 512 << 20,
        batch_bytes: int = _BATCH_BYTES,
        flush_timeout_s: float = 30.0,
        metrics: Metrics | None = None,
    ) -> None:
        self.name = inner.name
        self._inner = inner
        self._inner_ack = inner_ack
        self._waits_for = waits_for or inner_ack
        self._queue_bytes_max = queue_bytes_max
        self._batch_bytes = batch_bytes
        self._flush_timeout_s = flush_timeout_s
        self._metrics = metrics or Metrics()
        self._queued: dict[ChunkKey, Frame] = {}
        self._queued_bytes = 0
        self._lost = 0
        self._passing: Counter[ChunkKey] = Counter()
        self._wake = asyncio.Event()
        self._inner_busy = asyncio.Lock()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """How the inner backend is."""
        return state_of(self._inner)

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        match = await self._inner.match(keys)
        if self._queued.keys().isdisjoint(keys):
            return match
        held = list(match.held)
        # Queued chunks may fill the gap at which the inner run ends, and another inner run may follow.
        while len(held) < len(keys) and keys[len(held)] in self._queued:
            for key in keys[len(held) :]:
                if (frame := self._queued.get(key)) is None:
                    break
                held.append(self._held(frame))
            match = await self._inner.match(keys[len(held) :])
            held += match.held
        # As in a get, what is queued goes before what it will replace or make longer.
        for position, key in enumerate(keys[: len(held)]):
            if (frame := self._queued.get(key)) is not None:
                held[position] = self._held(frame)
        return Match(held, match.miss)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        queued = {key: frame.truncated(level) for key in keys if (frame := self._queued.get(key))}
        rest = [key for key in keys if key not in queued]
        found: dict[ChunkKey, Frame | Miss] = dict(queued)
        if rest:
            found |= zip(rest, await self._inner.get(rest, level=level), strict=True)
        return [found[key] for key in keys]

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        self._check_open()
        if ack >= self._waits_for:
            return await self._put_through(items, ack)
        if sum(frame.memory_bytes for _, frame in items) > self._queue_bytes_max:
            # It could never be queued, however often it is tried again.
            return await self._put_through(items, self._inner_ack)
        while any(key in self._passing for key, _ in items):
            # Another put of the same chunk is on its way to the inner backend: it decides first.
            async with self._inner_busy:
                pass
        self._check_open()
        news = [(key, frame) for key, frame in items if await self._is_news(key, frame)]
        if self._queued_bytes + sum(frame.memory_bytes for _, frame in news) > self._queue_bytes_max:
            return self._refuse(items)
        return [await self._accept(key, frame) for key, frame in items]

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        # Not before it is this one's turn: what was to be put before may only be queued by then.
        async with self._inner_busy:
            for key in keys:
                if (frame := self._queued.get(key)) is not None and frame.levels > level + 1:
                    self._enqueue(key, frame.truncated(level))
            await self._inner.trim(keys, level=level)

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        # A batch that is being written may hold these keys, and puts that wait for it may queue them.
        async with self._inner_busy:
            for key in keys:
                self._dequeue(key)
            await self._inner.delete(keys)

    async def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        queued = dict(self._queued)
        for key, frame in queued.items():
            if namespace is None or key[:NAMESPACE_BYTES] == namespace:
                yield key, self._held(frame)
        async for key, held in self._inner.scan(namespace):
            if key not in queued:
                yield key, held

    async def flush(self) -> None:
        """Write out everything that is queued now, however long the inner backend is down meanwhile."""
        while self._queued:
            pause_s = await self._write_batch()
            await asyncio.sleep(pause_s)

    async def aclose(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set()
        waiting, lost, started_s = len(self._queued), self._lost, time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._flush_timeout_s):
                if self._task is not None:
                    await asyncio.shield(self._task)
                await self.flush()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._report(waiting, self._lost - lost, time.monotonic() - started_s)
        await self._inner.aclose()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise BackendUnavailableError(self.name, "is closing")

    async def _put_through(self, items: Sequence[tuple[ChunkKey, Frame]], ack: Ack) -> list[Stored]:
        keys = [key for key, _ in items]
        self._passing.update(keys)
        try:
            async with self._inner_busy:
                return await self._write_now(items, ack)
        finally:
            self._passing.subtract(keys)
            self._passing += Counter()

    async def _write_now(self, items: Sequence[tuple[ChunkKey, Frame]], ack: Ack) -> list[Stored]:
        """Write frames past the queue, but not past what the queue holds under their keys: that came first."""
        queued = [self._queued.get(key) for key, _ in items]
        outcomes = [
            Outcome.WRITTEN if before is None else put_outcome(self._held(before), frame)
            for before, (_, frame) in zip(queued, items, strict=True)
        ]
        longest = [
            (key, before if before is not None and outcome is Outcome.EXISTS else frame)
            for before, outcome, (key, frame) in zip(queued, outcomes, items, strict=True)
            if outcome is not Outcome.OTHER
        ]
        written = iter(await self._inner.put(longest, ack=ack))
        results = []
        for before, outcome, (key, _) in zip(queued, outcomes, items, strict=True):
            result = Stored(Outcome.OTHER, Ack.MEMORY) if outcome is Outcome.OTHER else next(written)
            if before is not None and outcome is not Outcome.OTHER and result.outcome is not Outcome.FAILED:
                # Nothing else can be queued here meanwhile: puts wait for this one, trims and deletes for the lock.
                self._dequeue(key)
                if result.outcome is Outcome.WRITTEN:
                    result = result._replace(outcome=outcome)
            results.append(result)
        return results

    async def _find(self, key: ChunkKey) -> Held | None:
        if (frame := self._queued.get(key)) is not None:
            return self._held(frame)
        match = await self._inner.match([key])
        return match.held[0] if match.held else None

    async def _is_news(self, key: ChunkKey, frame: Frame) -> bool:
        return put_outcome(await self._find(key), frame) in (Outcome.WRITTEN, Outcome.EXTENDED)

    async def _accept(self, key: ChunkKey, frame: Frame) -> Stored:
        """Queue a frame, unless it is there already."""
        outcome = put_outcome(await self._find(key), frame)
        if outcome in (Outcome.EXISTS, Outcome.OTHER):
            return Stored(outcome, Ack.MEMORY if key in self._queued else self._inner_ack)
        self._enqueue(key, frame)
        return Stored(outcome, Ack.MEMORY)

    def _held(self, frame: Frame) -> Held:
        return held_from(self.name, frame)

    def _refuse(self, items: Sequence[tuple[ChunkKey, Frame]]) -> list[Stored]:
        """The answer to puts for which the queue has no room.

        Raises:
            BackendBusyError: Room will come as the queue is written.
        """
        waiting = f"{self._queued_bytes} bytes wait to be written"
        state = self.state
        if state.up:
            raise BackendBusyError(self.name, f"{waiting}; try again", retry_after_s=1.0)
        self._metrics.write_skips.labels(self.name).inc(len(items))
        error = BackendUnavailableError(self.name, f"{waiting}, and it is down: {state.detail}")
        return [Stored(Outcome.FAILED, None, error)] * len(items)

    def _enqueue(self, key: ChunkKey, frame: Frame) -> None:
        self._dequeue(key)
        self._queued[key] = frame
        self._queued_bytes += frame.memory_bytes
        self._gauge()
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name=f"kvstore-write-behind-{self.name}")
        self._wake.set()

    def _dequeue(self, key: ChunkKey) -> None:
        if (frame := self._queued.pop(key, None)) is not None:
            self._queued_bytes -= frame.memory_bytes
            self._gauge()

    async def _work(self) -> None:
        while not self._closing.is_set():
            await self._wake.wait()
            self._wake.clear()
            while self._queued and not self._closing.is_set():
                pause_s = await self._write_batch()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), pause_s) if pause_s else None

    async def _write_batch(self) -> float:
        """Write the oldest queued frames; those that cannot be stored are given up.

        Returns:
            Seconds to wait before the next batch: the inner backend is down, and what is queued stays.
        """
        async with self._inner_busy:
            batch = self._oldest()
            errors: list[Exception | None]
            try:
                stored = await self._inner.put(batch, ack=self._inner_ack) if batch else []
                errors = [
                    result.error if result.outcome is Outcome.FAILED else None
                    for _, result in zip(batch, stored, strict=True)
                ]
            except Exception as exc:  # Whatever it is, the frames behind these must still be written.
                errors = [exc] * len(batch)
            pause_s = 0.0
            failed: list[Exception] = []
            for (key, frame), error in zip(batch, errors, strict=True):
                if isinstance(error, BackendUnavailableError):
                    pause_s = max(pause_s, error.retry_after_s, _PAUSE_S)
                    if self._queued.get(key) is frame:
                        # Behind the others, in case it is this frame that the backend cannot take.
                        self._queued[key] = self._queued.pop(key)
                    continue
                if self._queued.get(key) is frame:
                    self._dequeue(key)
                if error is not None:
                    failed.append(error)
        if failed:
            self._lost += len(failed)
            self._metrics.write_failures.labels(self.name).inc(len(failed))
            log.warning("%d of %d chunks were not written to %s: %s", len(failed), len(batch), self.name, failed[0])
        return min(pause_s, _PAUSE_MAX_S)

    def _report(self, waiting: int, lost: int, took_s: float) -> None:
        """Say what a shutdown wrote, and what it did not; why some could not be written was said already."""
        if self._queued:
            log.warning(
                "%d of %d chunks that waited for %s, %d bytes, are not known to be written after %.1f s: %s",
                len(self._queued),
                waiting,
                self.name,
                sum(frame.size_bytes for frame in self._queued.values()),
                took_s,
                self.state.detail or "it was too slow",
            )
        elif lost:
            log.warning("%d of %d chunks that waited for %s could not be written", lost, waiting, self.name)
        elif waiting:
            log.info("the %d chunks that waited for %s are written, in %.1f s", waiting, self.name, took_s)

    def _oldest(self) -> list[tuple[ChunkKey, Frame]]:
        batch: list[tuple[ChunkKey, Frame]] = []
        batch_bytes = 0
        for key, frame in self._queued.items():
            if batch and batch_bytes + frame.size_bytes > self._batch_bytes:
                break
            batch.append((key, frame))
            batch_bytes += frame.size_bytes
        return batch

    def _gauge(self) -> None:
        self._metrics.queued_bytes.labels(self.name).set(self._queued_bytes)
