"""A client's links to one server: opened by upgrading HTTP connections, kept, and used again."""

import asyncio
import math
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

from kvstore.errors import BodySizeError
from kvstore.link import MESSAGE_BYTES, PATH, PROTOCOL, Link, LinkClosedError, pack_message, unpack_message
from kvstore.link_body import LinkBody

_HEAD_BYTES_MAX = 16 << 10
_REFUSED_S = 60.0
# To copy so few bytes costs less than to send them as a view of their own.
_JOINED_BYTES = 4096

T = TypeVar("T")


class LinkRefusedError(ConnectionError):
    """There is a server, but it (or a proxy before it) does not upgrade connections; HTTP may work."""


class Links:
    """At most so many links, each of which carries one request at a time.

    Args:
        url: Root of the server.
        headers: Headers of the upgrade, such as the authorization.
        links_max: Most links that are open at one time.
    """

    def __init__(self, url: str, headers: Mapping[str, str], links_max: int) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port or 80
        lines = [f"GET {parts.path}{PATH} HTTP/1.1", f"Host: {parts.netloc.rpartition('@')[2]}", "Connection: Upgrade"]
        lines += [f"Upgrade: {PROTOCOL}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self._upgrade = "\r\n".join(lines).encode("utf-8")
        # A link leaves the socket's bytes as they are, so there is none over TLS.
        self._refused_until_s = 0.0 if parts.scheme == "http" else float("inf")
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(links_max)
        self._idle: deque[Link] = deque()
        self._closed = False

    @property
    def refused(self) -> bool:
        """Whether the server is known not to upgrade; it is asked again after a minute."""
        return time.monotonic() < self._refused_until_s

    async def ask(
        self,
        target: bytes,
        body: Sequence[memoryview | bytes],
        body_bytes: int,
        timeout_s: float,
        read: Callable[[int, LinkBody], Awaitable[T]],
    ) -> T:
        """Send a request; the link is kept if its answer is read to the end.

        Args:
            target: Route without `/v1/`, with its query.
            body: Views of the body.
            body_bytes: Bytes of it.
            timeout_s: Seconds that all of it may take.
            read: Makes of the answer's status and body what is returned.

        Raises:
            LinkRefusedError: The server does not upgrade connections.
            TimeoutError: It takes too long.
            OSError: It cannot be reached, or the connection broke.
        """
        ends_s = self._loop.time() + timeout_s
        await self._enter(ends_s)
        try:
            link, status, answer_bytes = await self._send(target, body, body_bytes, ends_s)
            answer = LinkBody(link, answer_bytes)
            try:
                return await read(status, answer)
            finally:
                self._leave(link, whole=not answer.open and not answer.left_bytes)
        finally:
            self._room.release()

    async def ask_small(
        self,
        target: bytes,
        body: Sequence[memoryview | bytes],
        body_bytes: int,
        timeout_s: float,
        answer_bytes_max: int,
    ) -> tuple[int, bytes]:
        """As `ask`, for an answer of at most so many bytes: its status and all of it.

        Raises:
            BodySizeError: It is larger, or in parts.
        """
        ends_s = self._loop.time() + timeout_s
        await self._enter(ends_s)
        try:
            link, status, answer_bytes = await self._send(target, body, body_bytes, ends_s)
            answer: bytes | None = None
            try:
                if answer_bytes > answer_bytes_max:
                    raise BodySizeError(f"an answer of {answer_bytes} bytes is over the limit of {answer_bytes_max}")
                if (answer := link.taken(answer_bytes)) is None:
                    answer = await LinkBody(link, answer_bytes).rest()
                return status, answer
            finally:
                self._leave(link, whole=answer is not None)
        finally:
            self._room.release()

    def close(self) -> None:
        """Close all links, those that are in use when they are not any more."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    async def _enter(self, ends_s: float) -> None:
        """Take one of the places."""
        if not self._room.locked():
            await self._room.acquire()
            return
        async with asyncio.timeout_at(ends_s):
            await self._room.acquire()

    def _leave(self, link: Link, *, whole: bool) -> None:
        """Keep a link whose answer was read as a whole and nothing else came on it."""
        link.reschedule(math.inf)
        if self._closed or not whole or link.ready_bytes:
            link.close()
        else:
            self._idle.append(link)

    async def _send(
        self, target: bytes, body: Sequence[memoryview | bytes], body_bytes: int, ends_s: float
    ) -> tuple[Link, int, int]:
        """Send a message: the link, and what the head of the answer says."""
        head = pack_message(len(target), body_bytes) + target
        message = [head + body[0]] if body_bytes <= _JOINED_BYTES and len(body) == 1 else [head, *body]
        while True:
            kept = bool(self._idle)
            link = self._idle.pop() if kept else await self._open(ends_s)
            link.reschedule(ends_s)
            try:
                if not link.send_some(message):
                    await link.send(())
                return link, *unpack_message(await link.take(MESSAGE_BYTES))
            except ConnectionError:
                link.close()
                # The server may have closed a link that was idle. What it carries may be sent twice.
                if not kept:
                    raise
            except BaseException:
                link.close()
                raise

    async def _open(self, ends_s: float) -> Link:
        async with asyncio.timeout_at(ends_s):
            link = Link(await self._connect())
        link.reschedule(ends_s)
        try:
            await link.send([self._upgrade])
            head = await _read_head(link)
        except BaseException:
            link.close()
            raise
        status, _, rest = head.partition(b"\r\n")
        if status.split(b" ")[1:2] != [b"101"] or f"upgrade: {PROTOCOL}\r\n".encode() not in rest.lower():
            link.close()
            self._refused_until_s = time.monotonic() + _REFUSED_S
            raise LinkRefusedError(f"the server answers {status!r}")
        return link

    async def _connect(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        failure = OSError(f"{self._host} has no address")
        for family, kind, protocol, _, address in found:
            connecting = socket.socket(family, kind, protocol)
            connecting.setblocking(False)
            try:
                await loop.sock_connect(connecting, address)
            except OSError as exc:
                connecting.close()
                failure = exc
            except BaseException:
                connecting.close()
                raise
            else:
                return connecting
        raise failure


async def _read_head(link: Link) -> bytes:
    """Head of an HTTP answer, to its blank line."""
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        if len(head) == _HEAD_BYTES_MAX:
            raise LinkClosedError("the head of the answer has no end")
        head += await link.take(1)
    return bytes(head)
