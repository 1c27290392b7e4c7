"""A backend in front of a slow one: puts that need not wait are queued in memory and written in batches.

The queue is bounded; when it is full a put is refused with `BackendUnavailableError`, so memory never grows without
limit. What is queued is visible like everything else, and `aclose` writes it out.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence

from kvstore.backend import Ack, Backend, Held, Match, Miss, Outcome, Stored, put_outcome
from kvstore.backends.index import held_from
from kvstore.errors import BackendUnavailableError
from kvstore.frame import Frame
from kvstore.keys import NAMESPACE_BYTES, ChunkKey
from kvstore.metrics import Metrics

_BATCH_BYTES = 64 << 20

log = logging.getLogger(__name__)


class WriteBehind:
    """Wraps a backend whose puts are durable but slow.

    Args:
        inner: The backend that is written to; this wrapper owns and closes it.
        inner_ack: Durability of a put that `inner` has answered.
        queue_bytes_max: Bytes that may wait, at most what `inner` can hold; a larger batch is written before it is
            answered.
        metrics: Where to count; its own by default.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        inner_ack: Ack = Ack.DISK,
        queue_bytes_max: int = 512 << 20,
        metrics: Metrics | None = None,
    ) -> None:
        self.name = inner.name
        self._inner = inner
        self._inner_ack = inner_ack
        self._queue_bytes_max = queue_bytes_max
        self._metrics = metrics or Metrics()
        self._queued: dict[ChunkKey, Frame] = {}
        self._queued_bytes = 0
        self._passing: Counter[ChunkKey] = Counter()
        self._wake = asyncio.Event()
        self._inner_busy = asyncio.Lock()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        match = await self._inner.match(keys)
        if not self._queued:
            return match
        held = list(match.held)
        # Queued chunks may fill the gap at which the inner run ends, and another inner run may follow.
        while match.miss is not None and keys[len(held)] in self._queued:
            for key in keys[len(held) :]:
                if (frame := self._queued.get(key)) is None:
                    break
                held.append(self._held(frame))
            match = await self._inner.match(keys[len(held) :])
            held += match.held
        return Match(held, match.miss)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        queued = {key: frame.truncated(level) for key in keys if (frame := self._queued.get(key))}
        rest = [key for key in keys if key not in queued]
        found: dict[ChunkKey, Frame | Miss] = dict(queued)
        if rest:
            found |= zip(rest, await self._inner.get(rest, level=level), strict=True)
        return [found[key] for key in keys]

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        if self._closing:
            raise BackendUnavailableError(self.name, "is closing")
        if ack >= self._inner_ack:
            return await self._put_through(items, ack)
        if sum(frame.memory_bytes for _, frame in items) > self._queue_bytes_max:
            # It could never be queued, however often it is tried again.
            return await self._put_through(items, self._inner_ack)
        while any(key in self._passing for key, _ in items):
            # Another put of the same chunk is on its way to the inner backend: it decides first.
            async with self._inner_busy:
                pass
        self._reserve(sum([frame.memory_bytes for key, frame in items if await self._is_news(key, frame)]))
        return [await self._accept(key, frame) for key, frame in items]

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        for key in keys:
            if (frame := self._queued.get(key)) is not None:
                self._enqueue(key, frame.truncated(level))
        async with self._inner_busy:
            await self._inner.trim(keys, level=level)

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            self._dequeue(key)
        # A batch that is being written may hold these keys: wait for it, then delete.
        async with self._inner_busy:
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
        """Write out everything that is queued now."""
        while self._queued:
            await self._write_batch()

    async def aclose(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._task is not None:
            self._wake.set()
            await self._task
        await self.flush()
        await self._inner.aclose()

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
                if self._queued.get(key) is before:
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

    def _reserve(self, size_bytes: int) -> None:
        if self._queued_bytes + size_bytes > self._queue_bytes_max:
            raise BackendUnavailableError(
                self.name, f"{self._queued_bytes} bytes wait to be written; try again", retry_after_s=1.0
            )

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
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            await self.flush()

    async def _write_batch(self) -> None:
        """Write the oldest queued frames, one transaction's worth; those that cannot be stored are given up."""
        async with self._inner_busy:
            batch = self._oldest()
            try:
                stored = await self._inner.put(batch, ack=self._inner_ack) if batch else []
                failed: list[Exception | None] = [result.error for result in stored if result.outcome is Outcome.FAILED]
            except Exception as exc:  # Whatever it is, the frames behind these must still be written.
                failed = [exc] * len(batch)
            for key, frame in batch:
                if self._queued.get(key) is frame:
                    self._dequeue(key)
        if failed:
            self._metrics.write_failures.labels(self.name).inc(len(failed))
            log.warning("%d of %d chunks were not written to %s: %s", len(failed), len(batch), self.name, failed[0])

    def _oldest(self) -> list[tuple[ChunkKey, Frame]]:
        batch: list[tuple[ChunkKey, Frame]] = []
        batch_bytes = 0
        for key, frame in self._queued.items():
            if batch and batch_bytes + frame.size_bytes > _BATCH_BYTES:
                break
            batch.append((key, frame))
            batch_bytes += frame.size_bytes
        return batch

    def _gauge(self) -> None:
        self._metrics.queued_bytes.labels(self.name).set(self._queued_bytes)
