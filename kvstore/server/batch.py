"""Batches, as `Client` speaks them: `POST /v1/match|get|put|trim|delete` and `GET /v1/scan`.

Keys come as one namespace in the query and digests, 32 bytes each, in the body. Frames come and go as batch records
(`kvstore.wire`).
"""

import asyncio
from heapq import nsmallest
from itertools import groupby
from operator import attrgetter

from aiohttp import web

from kvstore.backend import Backend, Copy, Held, Miss, Stored
from kvstore.errors import RequestError
from kvstore.frame import Frame
from kvstore.keys import DIGEST_BYTES, ChunkKey, chunk_key, parse_hex, split_key
from kvstore.server.auth import Tenants
from kvstore.server.chunk import own
from kvstore.server.query import ack_of, level_of, namespace_of, with_namespace
from kvstore.server.receive import Receiver
from kvstore.server.send import Sender
from kvstore.wire import BATCH_TYPE, batch_views

SCAN_PAGE = 4096

_GET_WINDOW = 8
_GET_KEYS_MAX = 1024
_COPY = attrgetter("copy")


class BatchRoutes:
    """Handlers for batches. `backend` is set before the first request."""

    backend: Backend

    def __init__(self, tenants: Tenants, receiver: Receiver, sender: Sender) -> None:
        self._tenants = tenants
        self._receiver = receiver
        self._sender = sender

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
        """The longest leading run that is held, run-length coded, and why it ends."""
        _, stored = await self._keys(request)
        held, miss = await self.backend.match(stored)
        return web.json_response(
            {
                "matched": len(held),
                "runs": [_run_json(copy, len(list(run))) for copy, run in groupby(map(_COPY, held))],
                "miss": None if miss is None else miss.reason.value,
            }
        )

    async def get(self, request: web.Request) -> web.StreamResponse:
        """Frames and misses in the order of the keys; fewer than asked for where the answer gets too large."""
        level = level_of(request)
        keys, stored = await self._keys(request)
        records: list[Frame | Miss] = []
        room_bytes = self._receiver.limit_bytes
        while len(records) < min(len(keys), _GET_KEYS_MAX):
            start = len(records)
            count = await self._fitting(stored[start : start + _GET_WINDOW], level, room_bytes)
            if records and not count:
                break
            end = start + max(1, count)
            found = await self.backend.get(stored[start:end], level=level)
            records += [own(key, frame) for key, frame in zip(keys[start:end], found, strict=True)]
            room_bytes -= sum(frame.size_bytes for frame in found if isinstance(frame, Frame))
            # What memory answers never waits, and others want their turn.
            await asyncio.sleep(0)
        return await self._sender.send(request, 200, {"Content-Type": BATCH_TYPE}, list(batch_views(records)))

    async def put(self, request: web.Request) -> web.Response:
        """Store frames; the answer says of each what became of it."""
        tenant = self._tenants.authenticate(request)
        ack = ack_of(request)
        async with self._receiver.batch(request) as frames:
            stored = await self.backend.put([(self._stored_key(tenant, frame), frame) for frame in frames], ack=ack)
        return web.json_response({"stored": [_stored_json(result) for result in stored]})

    async def trim(self, request: web.Request) -> web.Response:
        """Drop the levels above `?level=`."""
        _, stored = await self._keys(request)
        if (level := level_of(request)) is None:
            raise RequestError("say which level stays: ?level=")
        await self.backend.trim(stored, level=level)
        return web.Response(status=204)

    async def delete(self, request: web.Request) -> web.Response:
        """Forget chunks."""
        _, stored = await self._keys(request)
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

    async def _keys(self, request: web.Request) -> tuple[list[ChunkKey], list[ChunkKey]]:
        """Keys that the client means, and those under which they are stored.

        Raises:
            KeyFormatError: The body is not a sequence of digests.
        """
        tenant = self._tenants.authenticate(request)
        namespace = namespace_of(request)
        digests = await self._receiver.digests(request)
        keys = with_namespace(namespace, digests)
        scoped = self._tenants.scope(tenant, namespace)
        return keys, keys if scoped == namespace else with_namespace(scoped, digests)

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


def _run_json(copy: Copy, count: int) -> dict[str, object]:
    return {"count": count, **copy._asdict()}


def _chunk_json(digest: bytes, held: Held) -> dict[str, object]:
    frame_id = None if held.frame_id is None else held.frame_id.hex()
    return {"digest": digest.hex(), "frame_id": frame_id, **held.copy._asdict()}


def _stored_json(stored: Stored) -> dict[str, object]:
    return {
        "outcome": stored.outcome.value,
        "ack": None if stored.ack is None else stored.ack.name.lower(),
        "code": None if stored.error is None else stored.error.code,
        "detail": None if stored.error is None else str(stored.error),
    }
