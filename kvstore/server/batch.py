"""Batches, as `Client` speaks them: `POST /v1/match|get|put|trim|delete` and `GET /v1/scan`.

Keys come as one namespace in the query and digests, 32 bytes each, in the body. Frames come and go as batch records
(`kvstore.wire`).
"""

import asyncio
from collections.abc import AsyncIterator
from heapq import nsmallest
from itertools import groupby
from operator import attrgetter

from aiohttp import web

from kvstore.backend import Ack, Backend, Copy, Held, Match, Miss, Stored
from kvstore.errors import RequestError
from kvstore.frame import Frame
from kvstore.keys import DIGEST_BYTES, ChunkKey, chunk_key, parse_hex, split_key
from kvstore.server.asked import Asked, asked_of
from kvstore.server.auth import Tenants
from kvstore.server.chunk import own
from kvstore.server.query import ack_of, level_of, namespace_of, wait_of
from kvstore.server.receive import Receiver
from kvstore.server.send import Sender
from kvstore.server.waiting import Waiting
from kvstore.wire import BATCH_TYPE, batch_views, total_bytes

SCAN_PAGE = 4096

_GET_WINDOW = 8
_GET_KEYS_MAX = 1024
_COPY = attrgetter("copy")


class BatchRoutes:
    """Handlers for batches. `backend` is set before the first request."""

    backend: Backend

    def __init__(self, tenants: Tenants, receiver: Receiver, sender: Sender, waiting: Waiting) -> None:
        self._tenants = tenants
        self._receiver = receiver
        self._sender = sender
        self._waiting = waiting

    def routes(self) -> list[web.RouteDef]:
        """The routes of this group."""
        return [
            web.post("/v1/match", self.match),
            web.post("/v1/get", self.get),
            web.post("/v1/put", self.put),
            web.post("/v1/trim", self.trim),
            web.post("/v1/delete", self.delete),
            web.get("/v1/scan", self.scan),
        ]

    async def match(self, request: web.Request) -> web.Response:
        """The longest leading run that is held, run-length coded, and why it ends; waits for it with `?wait_ms=`."""
        wait_s = wait_of(request)
        asked = await self._asked(request)
        await self._waiting.until_held(request, asked.tenant, asked.stored, wait_s)
        return web.json_response(match_json(await self.backend.match(asked.stored)))

    async def get(self, request: web.Request) -> web.StreamResponse:
        """Frames and misses in the order of the keys; fewer than asked for where the answer gets too large."""
        level = level_of(request)
        _, keys, stored = await self._asked(request)
        records = [record async for some in self.records(keys, stored, level) for record in some]
        views = list(batch_views(records))
        return await self._sender.send(request, 200, {"Content-Type": BATCH_TYPE}, views, total_bytes(views))

    async def put(self, request: web.Request) -> web.Response:
        """Store frames; the answer says of each what became of it."""
        tenant = self._tenants.authenticate(request)
        ack = ack_of(request)
        async with self._receiver.batch(request) as frames:
            return web.json_response(
                {"stored": [_stored_json(result) for result in await self.store(tenant, frames, ack)]}
            )

    async def trim(self, request: web.Request) -> web.Response:
        """Drop the levels above `?level=`."""
        _, _, stored = await self._asked(request)
        if (level := level_of(request)) is None:
            raise RequestError("say which level stays: ?level=")
        await self.backend.trim(stored, level=level)
        return web.Response(status=204)

    async def delete(self, request: web.Request) -> web.Response:
        """Forget chunks."""
        _, _, stored = await self._asked(request)
        await self.backend.delete(stored)
        return web.Response(status=204)

    async def scan(self, request: web.Request) -> web.Response:
        """A page of the chunks of one namespace, ordered by digest, after `?after=`."""
        tenant = self._tenants.authenticate(request)
        scoped = self._tenants.scope(tenant, namespace_of(request))
        after = request.query.get("after")
        least = b"" if after is None else parse_hex(after, DIGEST_BYTES, "after")
        found = {digest: held async for key, held in self.backend.scan(scoped) if (digest := split_key(key)[1]) > least}
        page = nsmallest(SCAN_PAGE, found)
        return web.json_response({"chunks": [_chunk_json(digest, found[digest]) for digest in page]})

    async def store(self, tenant: str, frames: list[Frame], ack: Ack) -> list[Stored]:
        """Put frames under the keys that they have for a tenant."""
        return await self.backend.put([(self._stored_key(tenant, frame), frame) for frame in frames], ack=ack)

    async def records(
        self, keys: list[ChunkKey], stored: list[ChunkKey], level: int | None, part_bytes: int | None = None
    ) -> AsyncIterator[list[Frame | Miss]]:
        """Frames and misses in the order of the keys, some at a time, as far as one answer may go.

        Args:
            keys: Keys that the client means.
            stored: Those under which they are stored.
            level: Highest level that is wanted.
            part_bytes: Bytes that are enough at one time; a frame is never cut.
        """
        start, window = 0, _GET_WINDOW if part_bytes is None else 1
        room_bytes = self._receiver.limit_bytes
        while start < min(len(keys), _GET_KEYS_MAX):
            end = start + 1
            # The first is sent however large it is.
            if start or window > 1:
                count = await self._fitting(stored[start : start + window], level, room_bytes)
                if start and not count:
                    break
                end = start + max(1, count)
            found = await self.backend.get(stored[start:end], level=level)
            yield [own(key, frame) for key, frame in zip(keys[start:end], found, strict=True)]
            got_bytes = sum(frame.size_bytes for frame in found if isinstance(frame, Frame))
            room_bytes -= got_bytes
            if part_bytes is not None:
                window = max(1, min(_GET_WINDOW, part_bytes * (end - start) // (got_bytes + 1)))
            start = end
            if start < len(keys):
                # What memory answers never waits, and others want their turn.
                await asyncio.sleep(0)

    async def _asked(self, request: web.Request) -> Asked:
        return await asked_of(request, self._tenants, self._receiver)

    def _stored_key(self, tenant: str, frame: Frame) -> ChunkKey:
        namespace, digest = split_key(frame.key)
        return chunk_key(self._tenants.scope(tenant, namespace), digest)

    async def _fitting(self, keys: list[ChunkKey], level: int | None, room_bytes: int) -> int:
        """Number of leading keys whose frames fit into the room; the first one that is not held ends the count."""
        held, _ = await self.backend.match(keys)
        for count, (_, copy) in enumerate(held):
            levels = len(copy.level_bytes) if level is None else level + 1
            room_bytes -= copy.head_bytes + sum(copy.level_bytes[:levels])
            if room_bytes < 0:
                return count
        return min(len(held) + 1, len(keys))


def match_json(found: Match) -> dict[str, object]:
    """A match as answers have it, run-length coded."""
    held, miss = found
    return {
        "matched": len(held),
        "runs": [_run_json(copy, len(list(run))) for copy, run in groupby(map(_COPY, held))],
        "miss": None if miss is None else miss.reason.value,
    }


def _run_json(copy: Copy, count: int) -> dict[str, object]:
    return {"count": count, **_copy_json(copy)}


def _chunk_json(digest: bytes, held: Held) -> dict[str, object]:
    frame_id = None if held.frame_id is None else held.frame_id.hex()
    return {"digest": digest.hex(), "frame_id": frame_id, **_copy_json(held.copy)}


def _copy_json(copy: Copy) -> dict[str, object]:
    return {**copy._asdict(), "profile": copy.profile.hex()}


def _stored_json(stored: Stored) -> dict[str, object]:
    return {
        "outcome": stored.outcome.value,
        "ack": None if stored.ack is None else stored.ack.name.lower(),
        "code": None if stored.error is None else stored.error.code,
        "detail": None if stored.error is None else str(stored.error),
    }
