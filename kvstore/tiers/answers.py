"""Asking tiers what they hold, and making one answer of those of several."""

import logging
from collections.abc import AsyncIterator, Iterable, Sequence

from kvstore.backend import Ack, Backend, Held, Match, Miss, Outcome, Reason, Stored
from kvstore.errors import KVStoreError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey

WINDOW = 1024
"""Chunks that are asked for at one time where the answer may be short."""

_OUTCOME_RANKS = (Outcome.OTHER, Outcome.EXISTS, Outcome.EXTENDED, Outcome.WRITTEN)

log = logging.getLogger(__name__)


async def match_of(tier: Backend, keys: Sequence[ChunkKey]) -> Match:
    """What a tier holds; one that cannot say holds nothing that could be served."""
    try:
        return await tier.match(keys)
    except KVStoreError as exc:
        log.warning("asking %s failed: %s", tier.name, exc)
        return Match([], Miss(Reason.BREAKER))


async def runs_of(tier: Backend, keys: Sequence[ChunkKey]) -> AsyncIterator[tuple[int, list[Held]]]:
    """Runs of chunks that a tier holds, each with the position of its first; none behind where asking fails."""
    start = 0
    try:
        while start < len(keys):
            held, _ = await tier.match(keys[start : start + WINDOW])
            if held:
                yield start, held
            # Where a run ends before its window, the next chunk is known not to be held.
            start += len(held) if len(held) == WINDOW else len(held) + 1
    except KVStoreError as exc:
        # Whoever does not answer once is not asked again for each chunk.
        log.warning("asking %s failed: %s", tier.name, exc)


async def overlay(tier: Backend, keys: Sequence[ChunkKey], run: list[Held], start: int, end: int) -> None:
    """Replace copies from `start` to `end` by a tier's copies of the same frames that have more levels."""
    async for offset, found in runs_of(tier, keys[start:end]):
        if found[0].frame_id is None:
            # It does not tell which frames it holds.
            return
        for position, held in enumerate(found, start + offset):
            before = run[position]
            if held.frame_id == before.frame_id and len(held.copy.level_bytes) > len(before.copy.level_bytes):
                run[position] = held


def satisfies(answer: Frame | Miss | None, level: int | None) -> bool:
    """Whether an answer has all the levels that were asked for."""
    return isinstance(answer, Frame) and (answer.whole or (level is not None and answer.levels > level))


def telling(misses: Iterable[Miss]) -> Miss:
    """The first miss that says more than that the chunk is absent.

    The lowest tier comes first: that a chunk was evicted above explains nothing, that it was damaged below does.
    """
    return next((miss for miss in misses if miss.reason is not Reason.ABSENT), Miss(Reason.ABSENT))


def merged(results: Sequence[Stored], asked: Ack) -> Stored:
    """One answer from those of all tiers: there already if any tier says so, as durable as the most durable."""
    error = next((result.error for result in results if result.error), None)
    kept = [result for result in results if result.outcome is not Outcome.FAILED]
    if not kept:
        return Stored(Outcome.FAILED, None, error)
    outcome = next(rank for rank in _OUTCOME_RANKS if any(result.outcome is rank for result in kept))
    reached = max(result.ack for result in kept if result.ack is not None)
    return Stored(outcome, reached, error if reached < asked else None)
