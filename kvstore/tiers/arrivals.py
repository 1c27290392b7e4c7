"""Waiting for chunks that somebody is about to put: woken by the put, not by asking again and again."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, runtime_checkable

from kvstore.backend import Backend, Match
from kvstore.errors import KVStoreError
from kvstore.keys import ChunkKey


@runtime_checkable
class Waits(Protocol):
    """A backend that can wait for chunks: a stack of tiers, and the client of a server."""

    async def wait(self, keys: Sequence[ChunkKey], wait_s: float) -> Match:
        """As `match`, but an answer that is not complete comes only after `wait_s` seconds."""
        ...


class Arrivals:
    """Who waits for which chunk. Whoever waits looks for himself what has come, so waking too many does no harm."""

    def __init__(self) -> None:
        self._waiting: dict[ChunkKey, set[asyncio.Future[None]]] = {}

    @contextmanager
    def of(self, key: ChunkKey) -> Iterator[asyncio.Future[None]]:
        """A future that is done once something was put under this key after the block began."""
        arrival = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(key, set())
        waiting.add(arrival)
        try:
            yield arrival
        finally:
            waiting.discard(arrival)
            if not waiting:
                del self._waiting[key]

    def announce(self, keys: Iterable[ChunkKey]) -> None:
        """Something was put under these keys, as far as it could be."""
        for key in keys if self._waiting else ():
            for arrival in self._waiting.get(key, ()):
                if not arrival.done():
                    arrival.set_result(None)


async def arrived(backend: Backend, arrivals: Arrivals, keys: Sequence[ChunkKey]) -> None:
    """Return once a backend holds all of these chunks; the caller bounds the time."""
    start = 0
    while start < len(keys):
        # Asked only after listening: what is put in between wakes this one.
        with arrivals.of(keys[start]) as arrival:
            held, _ = await backend.match(keys[start:])
            if not held:
                await arrival
            start += len(held)


async def wait_in(
    tiers: Sequence[Backend], stack: Backend, arrivals: Arrivals, keys: Sequence[ChunkKey], wait_s: float
) -> Match:
    """What a stack holds of some chunks once all are there, or when the time is over."""
    match = await stack.match(keys)
    if match.miss is None:
        return match
    remote = next((tier for tier in tiers if isinstance(tier, Waits)), None)
    with suppress(TimeoutError, KVStoreError):
        async with asyncio.timeout(wait_s):
            if remote is None:
                await arrived(stack, arrivals, keys[len(match.held) :])
            else:
                # What is put here goes there, too, and what others put comes there only.
                await remote.wait(keys[len(match.held) :], wait_s)
    return await stack.match(keys)
