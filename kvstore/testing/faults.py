"""Backends that fail on purpose: the same protocol, so they go wherever a backend goes."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from kvstore.backend import Ack, Backend, Held, Match, Miss, State, Stored, state_of
from kvstore.errors import BackendBusyError, BackendError, BackendUnavailableError
from kvstore.frame import Frame
from kvstore.keys import ChunkKey


class FaultyBackend:
    """Passes everything on to another backend, unless it is told to fail or to wait.

    Attributes:
        error: Raised by every get, put, trim and delete while it is set; one that says that the backend is unavailable
            also shows in `state`.
        gate: Gets and puts wait until it is set.
        calls: Names of the methods called so far.
    """

    def __init__(self, inner: Backend) -> None:
        self.name = inner.name
        self.error: BackendError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[str] = []
        self._inner = inner

    @property
    def state(self) -> State:
        if isinstance(self.error, BackendUnavailableError) and not isinstance(self.error, BackendBusyError):
            return State(False, self.error.detail)
        return state_of(self._inner)

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        return await self._inner.match(keys)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        await self._before("get")
        return await self._inner.get(keys, level=level)

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        await self._before("put")
        return await self._inner.put(items, ack=ack)

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        await self._before("trim")
        await self._inner.trim(keys, level=level)

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        await self._before("delete")
        await self._inner.delete(keys)

    async def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        async for found in self._inner.scan(namespace):
            yield found

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _before(self, call: str) -> None:
        self.calls.append(call)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
