"""Requests on links: `GET /v1/link` upgrades a connection, which then carries the batch routes without HTTP.

Who asks is known from the upgrade. Limits, checks, metrics and errors are those of the HTTP routes.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache

from aiohttp import hdrs, web
from prometheus_client import Counter, Histogram

from kvstore.answers import pack_match, pack_puts
from kvstore.config import ServerConfig
from kvstore.errors import KVStoreError, RequestError
from kvstore.keys import ChunkKey
from kvstore.link import (
    MESSAGE_BYTES,
    PATH,
    PROTOCOL,
    TARGET_BYTES_MAX,
    Link,
    LinkClosedError,
    pack_message,
    unpack_message,
)
from kvstore.link_body import IN_PARTS, LinkBody, pack_part
from kvstore.metrics import Metrics
from kvstore.server.auth import Tenants
from kvstore.server.batch import BatchRoutes
from kvstore.server.problems import failure, problem
from kvstore.server.query import ack_of, level_of, namespace_of, with_namespace
from kvstore.server.receive import SLOWEST_BYTES_PER_S, Receiver
from kvstore.wire import batch_views, total_bytes

_PART_BYTES = 4 << 20
_DISCARD_S = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """What a request names: its route without `/v1/`, and the parameters."""

    name: str
    query: dict[str, str]


@dataclass(slots=True, eq=False)
class _Request:
    tenant: str
    target: _Target
    link: Link
    body: LinkBody


# One client asks for the same over and over, with other keys in the body.
@lru_cache(maxsize=1024)
def _parse_target(text: bytes) -> _Target:
    name, _, query = text.decode("ascii", "replace").partition("?")
    return _Target(name, dict(field.partition("=")[::2] for field in query.split("&")))


_namespace_of = lru_cache(maxsize=1024)(namespace_of)


def _in(seconds: float) -> float:
    """A time of the loop's clock."""
    return asyncio.get_running_loop().time() + seconds


class LinkRoutes:
    """The handler that upgrades connections, and those of the requests on them.

    Args:
        tenants: Who may ask.
        receiver: Limits of bodies.
        batch: The routes for batches; its backend answers.
        config: Limits.
        metrics: Where to count.
        running: Entered while a request is answered.
    """

    def __init__(
        self,
        tenants: Tenants,
        receiver: Receiver,
        batch: BatchRoutes,
        config: ServerConfig,
        metrics: Metrics,
        running: AbstractContextManager[None],
    ) -> None:
        self._tenants = tenants
        self._receiver = receiver
        self._batch = batch
        self._timeout_s = config.body_timeout_s
        self._metrics = metrics
        self._running = running
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._counted: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._handlers: dict[str, Callable[[_Request], Awaitable[int]]] = {
            "match": self._match,
            "get": self._get,
            "put": self._put,
            "trim": self._trim,
            "delete": self._delete,
        }

    def routes(self) -> list[web.RouteDef]:
        """The routes of this group."""
        return [web.get(PATH, self.upgrade, allow_head=False)]

    async def upgrade(self, request: web.Request) -> web.Response:
        """Switch the connection to the protocol of links."""
        tenant = self._tenants.authenticate(request)
        transport = request.transport
        # A proxy that does not pass upgrades on leaves out `Connection`; what it sends then is still HTTP.
        asked = {word.strip() for word in request.headers.get(hdrs.CONNECTION, "").lower().split(",")}
        wanted = "upgrade" in asked and request.headers.get(hdrs.UPGRADE, "").lower() == PROTOCOL
        # Behind TLS the bytes of the socket are not ours to read.
        if not wanted or transport is None or transport.get_extra_info("sslcontext") is not None:
            detail = f"this route only upgrades plain connections to {PROTOCOL}"
            return problem(
                426, "upgrade-required", detail, headers={hdrs.UPGRADE: PROTOCOL, hdrs.CONNECTION: "Upgrade"}
            )
        # The transport is closed behind the answer, as that of any last request. The connection lives on in its
        # duplicate, so nothing in aiohttp has to know.
        transport.pause_reading()
        link = Link(transport.get_extra_info("socket").dup())
        task = asyncio.create_task(self._serve(link, tenant))
        self._links[link] = task
        task.add_done_callback(lambda _: self._links.pop(link))
        response = web.Response(status=101, headers={hdrs.UPGRADE: PROTOCOL, hdrs.CONNECTION: "Upgrade"})
        response.force_close()
        return response

    async def shutdown(self, _: web.Application) -> None:
        """Close every link; whoever had a request running was waited for before."""
        tasks = list(self._links.values())
        for link in list(self._links):
            link.close()
        await asyncio.gather(*tasks)

    async def _serve(self, link: Link, tenant: str) -> None:
        """Answer requests until the client has gone or does not keep to the protocol."""
        try:
            while True:
                target_bytes, body_bytes = unpack_message(await link.take(MESSAGE_BYTES))
                if target_bytes > TARGET_BYTES_MAX or body_bytes == IN_PARTS:
                    return
                with self._running:
                    if (text := link.taken(target_bytes)) is None:
                        with link.limited(_in(self._timeout_s)):
                            text = await link.take(target_bytes)
                    await self._answer(_Request(tenant, _parse_target(text), link, LinkBody(link, body_bytes)))
        except (ConnectionError, TimeoutError):
            return
        finally:
            link.close()

    async def _answer(self, request: _Request) -> None:
        started_s = time.perf_counter()
        handler = self._handlers.get(request.target.name)
        try:
            status = await (handler or self._unknown)(request)
        except ConnectionError:
            raise
        except Exception as exc:
            status = await self._fail(request, exc)
        route = "unknown" if handler is None else f"/v1/{request.target.name}"
        requests, seconds = self._counters(route, status)
        requests.inc()
        seconds.observe(time.perf_counter() - started_s)

    def _counters(self, route: str, status: int) -> tuple[Counter, Histogram]:
        if (found := self._counted.get((route, status))) is None:
            labelled = self._metrics.requests.labels(route, str(status)), self._metrics.request_seconds.labels(route)
            found = self._counted[route, status] = labelled
        return found

    async def _fail(self, request: _Request, exc: Exception) -> int:
        answer = failure(f"{request.target.name} on a link", exc)
        fields = json.loads(answer.text or "{}")
        if hdrs.RETRY_AFTER in answer.headers:
            fields["retry_after_s"] = float(answer.headers[hdrs.RETRY_AFTER])
        await self._send(request, answer.status, json.dumps(fields).encode())
        if isinstance(exc, TimeoutError):
            raise LinkClosedError("what else the client sends is not waited for") from exc
        # The client sends to the end before it listens.
        with request.link.limited(_in(_DISCARD_S)):
            await request.body.discard()
        return answer.status

    async def _unknown(self, _: _Request) -> int:
        raise RequestError("links carry " + ", ".join(self._handlers))

    async def _match(self, request: _Request) -> int:
        _, stored = await self._keys(request)
        return await self._send(request, 200, pack_match(await self._batch.backend.match(stored)))

    async def _get(self, request: _Request) -> int:
        level = level_of(request.target)
        keys, stored = await self._keys(request)
        head, count = pack_message(200, IN_PARTS), 0
        try:
            async for records in self._batch.records(keys, stored, level, _PART_BYTES):
                views = list(batch_views(records))
                part_bytes = total_bytes(views)
                count += len(records)
                last = [pack_part(0)] if count == len(keys) else []
                await self._send_views(request, [head + pack_part(part_bytes), *views, *last], part_bytes)
                self._metrics.sent_bytes.inc(part_bytes)
                head = b""
        except KVStoreError as exc:
            if head:
                raise
            # The answer has begun, so there is no other way to say that it ends here.
            raise LinkClosedError("an answer ended early") from exc
        if count < len(keys) or not keys:
            await self._send_views(request, [head + pack_part(0)], 0)
        return 200

    async def _put(self, request: _Request) -> int:
        ack = ack_of(request.target)
        async with self._receiver.link_batch(request.link, request.body) as frames:
            stored = await self._batch.store(request.tenant, frames, ack)
        return await self._send(request, 200, pack_puts(stored))

    async def _trim(self, request: _Request) -> int:
        if (level := level_of(request.target)) is None:
            raise RequestError("say which level stays: ?level=")
        _, stored = await self._keys(request)
        await self._batch.backend.trim(stored, level=level)
        return await self._send(request, 204, b"")

    async def _delete(self, request: _Request) -> int:
        _, stored = await self._keys(request)
        await self._batch.backend.delete(stored)
        return await self._send(request, 204, b"")

    async def _keys(self, request: _Request) -> tuple[list[ChunkKey], list[ChunkKey]]:
        """Keys that the client means, and those under which they are stored."""
        namespace = _namespace_of(request.target)
        digests = await self._receiver.link_digests(request.link, request.body)
        keys = with_namespace(namespace, digests)
        scoped = self._tenants.scope(request.tenant, namespace)
        return keys, keys if scoped == namespace else with_namespace(scoped, digests)

    async def _send(self, request: _Request, status: int, body: bytes) -> int:
        await self._send_views(request, [pack_message(status, len(body)) + body], len(body))
        return status

    async def _send_views(self, request: _Request, views: list[bytes | memoryview], size_bytes: int) -> None:
        """Send to a client that goes on reading; another one loses its connection."""
        if request.link.send_some(views):
            return
        try:
            with request.link.limited(_in(self._timeout_s + size_bytes / SLOWEST_BYTES_PER_S)):
                await request.link.send(())
        except TimeoutError as exc:
            raise LinkClosedError("the client does not take its answer") from exc
