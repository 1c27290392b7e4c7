"""`POST /v1/fetch`: the leading run of some chunks as one stream, all coarse levels before any finer one."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from kvstore.backend import Held, Miss
from kvstore.config import ServerConfig
from kvstore.errors import BackendBusyError, RequestError
from kvstore.frame import Frame
from kvstore.metrics import Metrics
from kvstore.server.asked import Asked, asked_of
from kvstore.server.auth import Tenants
from kvstore.server.chunk import own
from kvstore.server.query import level_of, wait_of
from kvstore.server.receive import Receiver
from kvstore.server.send import Sender
from kvstore.server.waiting import Waiting
from kvstore.stream import KEYS_MAX, STREAM_TYPE, stream_bytes, stream_views
from kvstore.tiers import TieredBackend

_READ_WINDOW = 8


class FetchRoutes:
    """The handler of fetches. `stack` is set before the first request."""

    stack: TieredBackend

    def __init__(
        self,
        tenants: Tenants,
        receiver: Receiver,
        sender: Sender,
        waiting: Waiting,
        config: ServerConfig,
        metrics: Metrics,
    ) -> None:
        self._tenants = tenants
        self._receiver = receiver
        self._sender = sender
        self._waiting = waiting
        self._bytes_max = config.fetch_bytes_max
        self._bytes = 0
        self._metrics = metrics

    def routes(self) -> list[web.RouteDef]:
        """The route of this group."""
        return [web.post("/v1/fetch", self.fetch)]

    async def fetch(self, request: web.Request) -> web.StreamResponse:
        """The chunks that are held of a leading run, and why it ends; fewer where they would take too much memory."""
        level, wait_s = level_of(request), wait_of(request)
        asked = await asked_of(request, self._tenants, self._receiver)
        if not 0 < len(asked.keys) <= KEYS_MAX:
            raise RequestError(f"a fetch asks for 1 to {KEYS_MAX} chunks, not {len(asked.keys)}")
        await self._waiting.until_held(request, asked.tenant, asked.stored, wait_s)
        held, miss = await self.stack.match(asked.stored)
        with self._room(held, level) as count:
            frames, found_miss = await self._read(asked, level, count)
            if found_miss is None and count == len(held):
                found_miss = miss
            headers = {"Content-Type": STREAM_TYPE}
            return await self._sender.send(
                request, 200, headers, stream_views(frames, found_miss), stream_bytes(frames, found_miss)
            )

    async def _read(self, asked: Asked, level: int | None, count: int) -> tuple[list[Frame], Miss | None]:
        """Frames of the first chunks; a miss ends them."""
        frames: list[Frame] = []
        for start in range(0, count, _READ_WINDOW):
            end = min(start + _READ_WINDOW, count)
            found = await self.stack.get(asked.stored[start:end], level=level)
            for key, stored in zip(asked.keys[start:end], found, strict=True):
                answer = own(key, stored)
                if isinstance(answer, Miss):
                    return frames, answer
                frames.append(answer)
            # What memory answers never waits, and others want their turn.
            await asyncio.sleep(0)
        return frames, None

    @contextmanager
    def _room(self, held: list[Held], level: int | None) -> Iterator[int]:
        """Memory for as many of these chunks as there is room for; gives their number.

        Raises:
            BackendBusyError: There is no room for the first one.
        """
        count, taken_bytes = 0, 0
        for _, copy in held:
            size_bytes = copy.head_bytes + sum(copy.level_bytes[: None if level is None else level + 1])
            # One chunk that is larger than all the room goes alone.
            if self._bytes + taken_bytes + size_bytes > self._bytes_max and self._bytes + taken_bytes > 0:
                break
            count, taken_bytes = count + 1, taken_bytes + size_bytes
        if held and not count:
            raise BackendBusyError("server", f"fetches hold {self._bytes} bytes of chunks; try again")
        self._bytes += taken_bytes
        self._metrics.fetching_bytes.set(self._bytes)
        try:
            yield count
        finally:
            self._bytes -= taken_bytes
            self._metrics.fetching_bytes.set(self._bytes)
