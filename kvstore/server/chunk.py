"""One chunk by its URL: `PUT|GET|HEAD|DELETE /v1/kv/{namespace}/{digest}`."""

from collections.abc import Iterator

from aiohttp import hdrs, web

from kvstore.backend import Backend, Miss, Outcome, Reason
from kvstore.errors import RangeError
from kvstore.frame import Frame, blob_of
from kvstore.keys import ChunkKey, chunk_key, split_key
from kvstore.server.auth import Tenants
from kvstore.server.problems import error_problem, miss_problem
from kvstore.server.query import ack_of, level_of, url_key, wait_of
from kvstore.server.receive import Receiver
from kvstore.server.send import Sender
from kvstore.server.waiting import Waiting
from kvstore.wire import BLOB_TYPE, FRAME_TYPE, total_bytes

PATH = "/v1/kv/{namespace}/{digest}"


class ChunkRoutes:
    """Handlers for single chunks. `backend` is set before the first request."""

    backend: Backend

    def __init__(self, tenants: Tenants, receiver: Receiver, sender: Sender, waiting: Waiting) -> None:
        self._tenants = tenants
        self._receiver = receiver
        self._sender = sender
        self._waiting = waiting

    def routes(self) -> list[web.RouteDef]:
        """The routes of this group."""
        return [
            web.put(PATH, self.put),
            web.get(PATH, self.get, allow_head=False),
            web.head(PATH, self.head),
            web.delete(PATH, self.delete),
        ]

    async def put(self, request: web.Request) -> web.Response:
        """Store a frame or an opaque blob."""
        key, stored_key = self._keys(request)
        ack = ack_of(request)
        async with self._receiver.chunk(request, key) as frame:
            [stored] = await self.backend.put([(stored_key, frame)], ack=ack)
        if stored.ack is None:
            raise stored.error or AssertionError("a put that is not held has an error")
        reached = stored.ack.name.lower()
        if stored.error is not None:
            # It is held, but less safely than was asked for.
            return error_problem(stored.error, headers={"Kvstore-Ack": reached}, ack=reached)
        return web.json_response(
            {"outcome": stored.outcome.value, "ack": reached},
            status=201 if stored.outcome in (Outcome.WRITTEN, Outcome.EXTENDED) else 200,
            headers={"Kvstore-Ack": reached},
        )

    async def get(self, request: web.Request) -> web.StreamResponse:
        """A frame as it is, or the bytes of a blob; both whole or a range; once it is there, with `?wait_ms=`."""
        if wait_s := wait_of(request):
            _, stored_key = self._keys(request)
            await self._waiting.until_held(request, self._tenants.authenticate(request), [stored_key], wait_s)
        frame = await self._find(request)
        if isinstance(frame, Miss):
            return miss_problem(frame.reason)
        headers = _headers(frame)
        if _is_known(request, frame):
            return web.Response(status=304, headers={hdrs.ETAG: headers[hdrs.ETAG]})
        views = _body(frame)
        full_bytes = total_bytes(views)
        wanted = _range(request, full_bytes, headers[hdrs.ETAG])
        if wanted:
            headers[hdrs.CONTENT_RANGE] = f"bytes {wanted.start}-{wanted.stop - 1}/{full_bytes}"
            views = list(_cut(views, wanted))
        return await self._sender.send(request, 206 if wanted else 200, headers, views, total_bytes(views))

    async def head(self, request: web.Request) -> web.StreamResponse:
        """The headers of a GET."""
        frame = await self._find(request)
        if isinstance(frame, Miss):
            return miss_problem(frame.reason)
        response = web.StreamResponse(status=304 if _is_known(request, frame) else 200, headers=_headers(frame))
        response.content_length = total_bytes(_body(frame))
        await response.prepare(request)
        return response

    async def delete(self, request: web.Request) -> web.Response:
        """Forget a chunk."""
        _, stored_key = self._keys(request)
        await self.backend.delete([stored_key])
        return web.Response(status=204)

    async def _find(self, request: web.Request) -> Frame | Miss:
        key, stored_key = self._keys(request)
        [frame] = await self.backend.get([stored_key], level=level_of(request))
        return own(key, frame)

    def _keys(self, request: web.Request) -> tuple[ChunkKey, ChunkKey]:
        """The key that the client means, and the one under which it is stored."""
        tenant = self._tenants.authenticate(request)
        key = url_key(request)
        namespace, digest = split_key(key)
        return key, chunk_key(self._tenants.scope(tenant, namespace), digest)


def own(key: ChunkKey, answer: Frame | Miss) -> Frame | Miss:
    """An answer, unless it is the frame of another key than the client's."""
    if isinstance(answer, Frame) and answer.key != key:
        return Miss(Reason.IDENTITY)
    return answer


def _headers(frame: Frame) -> dict[str, str]:
    return {
        hdrs.CONTENT_TYPE: FRAME_TYPE if blob_of(frame) is None else BLOB_TYPE,
        hdrs.ETAG: f'"{_etag(frame)}"',
        hdrs.ACCEPT_RANGES: "bytes",
        "Kvstore-Levels": f"{frame.levels}/{frame.head.header.levels}",
        "X-Content-Type-Options": "nosniff",
    }


def _body(frame: Frame) -> list[memoryview]:
    blob = blob_of(frame)
    return list(frame.buffers()) if blob is None else [blob]


def _etag(frame: Frame) -> str:
    return f"{frame.id.hex()}-{frame.levels}"


def _is_known(request: web.Request, frame: Frame) -> bool:
    """Whether the client has just this already, as `If-None-Match` says."""
    return any(tag.value in ("*", _etag(frame)) for tag in request.if_none_match or ())


def _range(request: web.Request, full_bytes: int, etag: str) -> range | None:
    """Bytes that a Range header asks for; None without one, or where `If-Range` names something else.

    Raises:
        RangeError: It is malformed, asks for several ranges, or lies behind the end.
    """
    if hdrs.RANGE not in request.headers or request.headers.get(hdrs.IF_RANGE, etag) != etag:
        return None
    try:
        wanted = request.http_range
    except ValueError as exc:
        raise RangeError(f"Range must be one range of bytes: {exc}", full_bytes) from exc
    # The last no bytes come out of aiohttp as all of them.
    found = range(full_bytes)[wanted] if request.headers[hdrs.RANGE].strip() != "bytes=-0" else range(0)
    if not found:
        raise RangeError(f"the range lies outside of the {full_bytes} bytes there are", full_bytes)
    return found


def _cut(views: list[memoryview], wanted: range) -> Iterator[memoryview]:
    start = 0
    for view in views:
        part = view[max(0, wanted.start - start) : max(0, wanted.stop - start)]
        if part:
            yield part
        start += len(view)
