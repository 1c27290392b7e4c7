"""An ordered list of backends as one backend, the fastest first.

A put goes to every tier; each decides what is to be done before it answers. A get is served by the first tier that
has all levels asked for, and what a lower tier served is promoted to the tiers above it. Tiers know by themselves what
they hold and what they evict, so the stack keeps no second index that could go stale.
"""

import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter

from kvstore.backend import Ack, Backend, Held, Match, Miss, Outcome, Reason, Stored, put_outcome
from kvstore.errors import BackendError, BackendUnavailableError, KVStoreError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics

_COPY = attrgetter("copy")
_WINDOW = 1024
_OUTCOME_RANKS = (Outcome.OTHER, Outcome.EXISTS, Outcome.EXTENDED, Outcome.WRITTEN)

log = logging.getLogger(__name__)


class TieredBackend:
    """The stack of tiers; it owns and closes them.

    Args:
        tiers: At least one backend, the fastest first. All but the last are caches of those below.
        metrics: Where to count; its own by default.
    """

    name = "stack"

    def __init__(self, tiers: Sequence[Backend], *, metrics: Metrics | None = None) -> None:
        if not tiers:
            raise ValueError("a stack needs at least one tier")
        self.tiers = tuple(tiers)
        self._metrics = metrics or Metrics()
        # Counts trims and deletes, so that a get which began before one does not bring back what it took away.
        self._removals = 0

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        run: list[Held] = []
        miss: Miss | None = None
        while len(run) < len(keys) and miss is None:
            longer, miss = await self._longest_run(keys[len(run) : len(run) + _WINDOW] if run else keys)
            if longer:
                run, miss = run + longer, None
        return Match(await self._with_all_levels(keys, run), miss)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        removals = self._removals
        found: dict[ChunkKey, Frame | Miss] = {}
        tier_of: dict[ChunkKey, str] = {}
        for depth, tier in enumerate(self.tiers):
            served = await self._get_more(tier, keys, level, found)
            tier_of |= dict.fromkeys(served, tier.name)
            if depth and self._removals == removals:
                await self._promote(depth, served)
        self._count(keys, found, tier_of)
        return [found[key] for key in keys]

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        results: list[list[Stored]] = [[] for _ in items]
        for position, (key, frame) in enumerate(items):
            results[position] += await self._refusal(key, frame, ack)
        # Lowest tier first: a bounded queue that refuses must do so before anything was stored above it, and the
        # tier that outlives the others decides which of two frames stays.
        for tier in reversed(self.tiers):
            wanted = [n for n, past in enumerate(results) if not any(s.outcome is Outcome.OTHER for s in past)]
            stored = await _put_to(tier, [items[n] for n in wanted], ack)
            for position, result in zip(wanted, stored, strict=True):
                results[position].append(result)
        merged = [_merge(past, ack) for past in results]
        for result in merged:
            self._metrics.puts.labels(result.outcome.value).inc()
        return merged

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        self._removals += 1
        for tier in self.tiers:
            await tier.trim(keys, level=level)
        self._removals += 1

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        self._removals += 1
        # In the order of puts, so that a put under way is not left in the upper tiers only.
        for tier in reversed(self.tiers):
            await tier.delete(keys)
        self._removals += 1

    async def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        seen: set[ChunkKey] = set()
        for tier in self.tiers:
            async for key, held in tier.scan(namespace):
                if key not in seen:
                    seen.add(key)
                    yield key, held

    async def aclose(self) -> None:
        for tier in self.tiers:
            await tier.aclose()

    async def _longest_run(self, keys: Sequence[ChunkKey]) -> tuple[list[Held], Miss | None]:
        """The longest run that one tier holds, each chunk as the fastest tier with an unbroken run has it."""
        run: list[Held] = []
        misses: list[Miss] = []
        for tier in self.tiers:
            match = await _match(tier, keys)
            run = run + match.held[len(run) :] if run else match.held
            if match.miss is None:
                return run, None
            misses.append(match.miss)
        return run, _telling(reversed(misses))

    async def _with_all_levels(self, keys: Sequence[ChunkKey], run: list[Held]) -> list[Held]:
        """The run with every partial copy replaced by the one of the lower tier that holds most of its levels."""
        if all(copy.whole for copy, _ in groupby(map(_COPY, run))):
            return run
        start = 0
        for copy, same in groupby(list(map(_COPY, run))):
            end = start + len(list(same))
            if not copy.whole:
                for tier in self.tiers[1:]:
                    await _overlay(tier, keys, run, start, end)
            start = end
        return run

    async def _get_more(
        self, tier: Backend, keys: Sequence[ChunkKey], level: int | None, found: dict[ChunkKey, Frame | Miss]
    ) -> dict[ChunkKey, Frame]:
        """Ask a tier for what is missing of `found`, add it there, and return what this tier served."""
        wanted = [key for key in keys if not _satisfies(found.get(key), level)]
        wanted = [key for key in wanted if not isinstance(found.get(key), Frame) or await _has_more(tier, key, found)]
        if not wanted:
            return {}
        try:
            answers = await tier.get(wanted, level=level)
        except KVStoreError as exc:
            log.warning("reading from %s failed: %s", tier.name, exc)
            answers = [Miss(Reason.BREAKER)] * len(wanted)
        served: dict[ChunkKey, Frame] = {}
        for key, answer in zip(wanted, answers, strict=True):
            better = _better(found.get(key), answer)
            if better is answer and isinstance(answer, Frame):
                served[key] = answer
            found[key] = better
        return served

    async def _promote(self, depth: int, served: dict[ChunkKey, Frame]) -> None:
        """Copy what a tier served into the tiers above it, as far as they have room."""
        for tier in self.tiers[:depth] if served else ():
            # What could not be copied up is still served.
            with suppress(BackendUnavailableError):
                await _put_to(tier, list(served.items()), Ack.MEMORY)

    async def _refusal(self, key: ChunkKey, frame: Frame, ack: Ack) -> list[Stored]:
        """The answer of the first tier that holds another frame under this key, if there is one."""
        for tier in self.tiers:
            match = await _match(tier, [key])
            if match.held and put_outcome(match.held[0], frame) is Outcome.OTHER:
                return await tier.put([(key, frame)], ack=ack)
        return []

    def _count(
        self, keys: Sequence[ChunkKey], found: dict[ChunkKey, Frame | Miss], tier_of: dict[ChunkKey, str]
    ) -> None:
        for key in keys:
            answer = found[key]
            if isinstance(answer, Miss):
                self._metrics.misses.labels(answer.reason.value).inc()
            else:
                self._metrics.hits.labels(tier_of[key]).inc()


async def _match(tier: Backend, keys: Sequence[ChunkKey]) -> Match:
    """What a tier holds; one that cannot say holds nothing that could be served."""
    try:
        return await tier.match(keys)
    except KVStoreError as exc:
        log.warning("asking %s failed: %s", tier.name, exc)
        return Match([], Miss(Reason.BREAKER))


async def _overlay(tier: Backend, keys: Sequence[ChunkKey], run: list[Held], start: int, end: int) -> None:
    """Replace copies from `start` to `end` by a tier's copies of the same frames that have more levels."""
    while start < end:
        match = await _match(tier, keys[start:end])
        for position, held in enumerate(match.held, start):
            if held.frame_id == run[position].frame_id and len(held.copy.level_bytes) > len(
                run[position].copy.level_bytes
            ):
                run[position] = held
        start += len(match.held) + 1


async def _put_to(tier: Backend, items: Sequence[tuple[ChunkKey, Frame]], ack: Ack) -> list[Stored]:
    """Put to one tier; its failure is an answer, unless it asks to be tried again later."""
    try:
        return await tier.put(items, ack=ack) if items else []
    except BackendUnavailableError:
        raise
    except KVStoreError as exc:
        error = exc if isinstance(exc, BackendError) else BackendError(tier.name, str(exc))
        return [Stored(Outcome.FAILED, None, error)] * len(items)


async def _has_more(tier: Backend, key: ChunkKey, found: dict[ChunkKey, Frame | Miss]) -> bool:
    """Whether a tier holds more levels of the frame that was found; asked from memory."""
    frame = found[key]
    match = await _match(tier, [key])
    return (
        isinstance(frame, Frame)
        and bool(match.held)
        and match.held[0].frame_id in (frame.id, None)
        and len(match.held[0].copy.level_bytes) > frame.levels
    )


def _satisfies(answer: Frame | Miss | None, level: int | None) -> bool:
    return isinstance(answer, Frame) and (answer.whole or (level is not None and answer.levels > level))


def _better(before: Frame | Miss | None, after: Frame | Miss) -> Frame | Miss:
    """The more useful of two answers; levels of different frames are never joined."""
    if before is None:
        return after
    if isinstance(before, Frame):
        longer = isinstance(after, Frame) and after.id == before.id and after.levels > before.levels
        return after if longer else before
    return after if isinstance(after, Frame) else _telling([after, before])


def _telling(misses: Iterable[Miss]) -> Miss:
    """The first miss that says more than that the chunk is absent.

    The lowest tier comes first: that a chunk was evicted above explains nothing, that it was damaged below does.
    """
    return next((miss for miss in misses if miss.reason is not Reason.ABSENT), Miss(Reason.ABSENT))


def _merge(results: Sequence[Stored], asked: Ack) -> Stored:
    """One answer from those of all tiers: there already if any tier says so, as durable as the most durable."""
    error = next((result.error for result in results if result.error), None)
    kept = [result for result in results if result.outcome is not Outcome.FAILED]
    if not kept:
        return Stored(Outcome.FAILED, None, error)
    outcome = next(rank for rank in _OUTCOME_RANKS if any(result.outcome is rank for result in kept))
    reached = max(result.ack for result in kept if result.ack is not None)
    return Stored(outcome, reached, error if reached < asked else None)
