"""Locks by key, so that changes of one chunk happen one after the other, in the order in which they were asked for."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

from kvstore.backends.s3_calls import Deadline
from kvstore.keys import ChunkKey


class KeyLocks:
    """A lock for every key that somebody holds or waits for."""

    def __init__(self) -> None:
        self._locks: dict[ChunkKey, asyncio.Lock] = {}
        self._users: dict[ChunkKey, int] = {}

    @asynccontextmanager
    async def hold(self, keys: Iterable[ChunkKey], deadline: Deadline) -> AsyncIterator[None]:
        """Hold the locks of all keys.

        Raises:
            DeadlineError: Others still hold one when the deadline passes.
        """
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(deadline.left_s):
                    # In one order for everybody, so that two batches never wait for each other.
                    for key in sorted(set(keys)):
                        await stack.enter_async_context(self._hold_one(key))
            except TimeoutError as exc:
                raise deadline.error() from exc
            yield

    @asynccontextmanager
    async def _hold_one(self, key: ChunkKey) -> AsyncIterator[None]:
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._users[key] = self._users.get(key, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]
