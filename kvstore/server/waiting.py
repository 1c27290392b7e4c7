"""Requests that wait for chunks somebody is about to put: bounded in time and in number.

A request that finds all it asks for never waits and takes no place. One that waits is woken by the put; it ends with
its time, with its connection, and when the server stops.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from aiohttp import web

from kvstore.config import ServerConfig
from kvstore.errors import BackendBusyError
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics
from kvstore.tiers import TieredBackend
from kvstore.tiers.arrivals import arrived


class Waiting:
    """All requests of a server that wait. `stack` is set before the first request."""

    stack: TieredBackend

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._wait_s_max = config.wait_s_max
        self._waiters_max = config.waiters_max
        self._tenant_waiters_max = config.tenant_waiters_max
        self._metrics = metrics
        self._tenants: Counter[str] = Counter()
        self._tasks: dict[object, asyncio.Task[object]] = {}
        self._timeouts: set[asyncio.Timeout] = set()
        self._stopped = False

    async def until_held(self, request: web.Request, tenant: str, keys: Sequence[ChunkKey], wait_s: float) -> None:
        """Return once all chunks are held, or after `wait_s` seconds.

        Raises:
            BackendBusyError: Some are not held, and too many requests wait already.
            CancelledError: The client has gone.
        """
        if wait_s == 0 or self._stopped or (await self.stack.match(keys)).miss is None:
            return
        outcome = "refused"
        try:
            with self._place(request, tenant):
                outcome = "gone"
                outcome = await self._wait(keys, min(wait_s, self._wait_s_max))
        finally:
            self._metrics.waits.labels(outcome).inc()

    def gone(self, connection: object) -> None:
        """A connection is lost, and nobody reads the answer to a request on it that waits."""
        if (task := self._tasks.get(connection)) is not None:
            task.cancel()

    def stop(self) -> None:
        """Let every request that waits answer with what is there, and none wait any more."""
        self._stopped = True
        for timeout in self._timeouts:
            timeout.reschedule(asyncio.get_running_loop().time())

    async def _wait(self, keys: Sequence[ChunkKey], wait_s: float) -> str:
        try:
            async with asyncio.timeout(wait_s) as timeout:
                self._timeouts.add(timeout)
                try:
                    await arrived(self.stack, self.stack.arrivals, keys)
                finally:
                    self._timeouts.discard(timeout)
        except TimeoutError:
            return "timeout"
        # A client that left in this very turn of the loop must not have its read cancelled later on.
        await asyncio.sleep(0)
        return "arrived"

    @contextmanager
    def _place(self, request: web.Request, tenant: str) -> Iterator[None]:
        if self._tenants.total() >= self._waiters_max or self._tenants[tenant] >= self._tenant_waiters_max:
            raise BackendBusyError("server", f"{self._tenants.total()} requests wait for chunks; try again")
        task = asyncio.current_task()
        assert task is not None, "a request is handled by a task"
        self._tasks[request.protocol] = task
        self._tenants[tenant] += 1
        self._metrics.waiting.inc()
        try:
            yield
        finally:
            self._metrics.waiting.dec()
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant]
            del self._tasks[request.protocol]
