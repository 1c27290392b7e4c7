"""A connection that has left HTTP behind: received straight into the buffers that keep the bytes, sent from views.

An HTTP parser copies every body twice more than is needed (docs/decisions). So a client asks the server to upgrade a
connection (RFC 9110, 7.8) and both then speak messages of their own, which carry the routes, bodies and errors of the
HTTP API:

    request:  length of the target (2 bytes) | 6 zero bytes | length of the body (8) | target | body
    answer:   status (2) | 6 zero bytes | length of the body (8) | body

Numbers are little-endian. The target is the route without `/v1/`, with its query. An answer whose length is `IN_PARTS`
has a body of parts, each behind its length (8 bytes), and ends with a part of no bytes.
"""

import asyncio
import math
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

PATH = "/v1/link"
PROTOCOL = "kvstore-link/2"
"""What the `Upgrade` header says; another version of the messages is another protocol."""

MESSAGE_BYTES = 16
TARGET_BYTES_MAX = 1024

_MESSAGE = struct.Struct("<H6xQ")
# A head, a target and some digests arrive in one call; larger buffers are filled without a detour.
_SCRATCH_BYTES = 16 << 10
# Others want their turn on the event loop.
_TURN_BYTES = 4 << 20
_VIEWS_MAX = 64
# So much may be under way. The kernel would come to as much by itself, but slowly and on one side only.
_SOCKET_BYTES = 4 << 20
_SOCKET_LIMITS = {socket.SO_SNDBUF: "wmem_max", socket.SO_RCVBUF: "rmem_max"}


class LinkClosedError(ConnectionError):
    """The peer closed the connection."""


class Link:
    """A connected stream socket, for one reader and one writer at a time.

    A call that is cancelled, or that ends with its time, leaves the link in the middle of a message: close it.

    Args:
        connected: The socket; the link owns it.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in _large_options():
            connected.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = self._end = 0
        self._target = memoryview(b"")
        self._enough = 0
        self._got = 0
        self._turn_bytes = 0
        self._arrived: Callable[[int], None] | None = None
        self._listens = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._unsent: list[memoryview] = []
        self._ends_s = math.inf
        self._timer: asyncio.TimerHandle | None = None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._socket.fileno() < 0

    @property
    def ready_bytes(self) -> int:
        """Bytes that have arrived and were not asked for yet, as far as is known; to take them never waits."""
        return self._end - self._start

    def reschedule(self, ends_s: float) -> None:
        """Let calls that still wait at this time of the loop's clock fail with a `TimeoutError`."""
        # No timer is moved for it: the one that is set looks here, and sets itself anew where it is too early.
        self._ends_s = ends_s

    @contextmanager
    def limited(self, ends_s: float) -> Iterator["Link"]:
        """Calls in this block fail with a `TimeoutError` when they still wait at this time, unless it is moved."""
        self._ends_s = ends_s
        try:
            yield self
        finally:
            self._ends_s = math.inf

    def taken(self, size_bytes: int) -> bytes | None:
        """Exactly that many bytes, None where they have not arrived yet."""
        start, end = self._start, self._start + size_bytes
        if end > self._end:
            return None
        self._start = end
        return bytes(self._scratch[start:end])

    async def take(self, size_bytes: int, *, expected: bool = False) -> bytes:
        """Exactly that many bytes, at most 16 KiB.

        Args:
            size_bytes: Number of bytes.
            expected: Whether they are probably there already.

        Raises:
            LinkClosedError: The peer closed the connection before.
            TimeoutError: They did not come in time.
        """
        if (taken := self.taken(size_bytes)) is not None:
            return taken
        ready = self._end - self._start
        self._scratch[:ready] = bytes(self._scratch[self._start : self._end])
        self._start, self._end = 0, ready
        self._end += await self._receive(self._scratch[ready:], size_bytes - ready, None, expected=expected)
        self._start = size_bytes
        return bytes(self._scratch[:size_bytes])

    async def fill(self, buffer: memoryview, arrived: Callable[[int], None] | None = None) -> None:
        """Fill a buffer.

        Args:
            buffer: What to fill.
            arrived: Called with the number of bytes whenever some are there, in order; may refuse them by raising.

        Raises:
            LinkClosedError: The peer closed the connection before.
            TimeoutError: They did not come in time.
        """
        ready = min(len(buffer), self._end - self._start)
        if ready:
            buffer[:ready] = self._scratch[self._start : self._start + ready]
            self._start += ready
            if arrived is not None:
                arrived(ready)
        missing = len(buffer) - ready
        if 0 < missing < _SCRATCH_BYTES:
            # What follows a small buffer comes along with it.
            self._start, self._end = 0, await self._receive(self._scratch, missing, None)
            await self.fill(buffer[ready:], arrived)
        elif missing:
            await self._receive(buffer[ready:], missing, arrived)

    def send_some(self, views: Sequence[bytes | memoryview]) -> bool:
        """Give the socket what it takes at once: whether that is all. Where it is not, `send` goes on with no views.

        Raises:
            ConnectionError: The connection is broken.
        """
        try:
            if len(views) == 1 and not self._unsent:
                # Small messages are one view, and this is all that happens to them.
                sent = self._socket.send(views[0])
                if sent == len(views[0]):
                    return True
                views = [memoryview(views[0])[sent:]]
            self._unsent[:0] = [memoryview(view) for view in reversed(views)]
            return self._push()
        except (BlockingIOError, InterruptedError):
            self._unsent = [memoryview(view) for view in reversed(views)]
            return False
        except BaseException:
            self._unsent = []
            raise

    async def send(self, views: Sequence[bytes | memoryview]) -> None:
        """Send bytes; the socket has taken all of them when this returns.

        Raises:
            ConnectionError: The connection is broken.
            TimeoutError: The peer did not take them in time.
        """
        if self.send_some(views):
            return
        self._writer = self._loop.create_future()
        self._loop.add_writer(self._socket, self._writable)
        try:
            self._watch()
            await self._writer
        finally:
            self._writer = None
            self._unsent = []
            if not self.closed:
                self._loop.remove_writer(self._socket)

    def close(self) -> None:
        """Close the connection; whoever waits on it gets a `LinkClosedError`."""
        if self.closed:
            return
        if self._listens:
            self._loop.remove_reader(self._socket)
        if self._writer is not None:
            self._loop.remove_writer(self._socket)
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close()
        self._fail(LinkClosedError("the connection was closed"))

    async def _receive(
        self, target: memoryview, enough: int, arrived: Callable[[int], None] | None, *, expected: bool = True
    ) -> int:
        """Receive at least `enough` bytes into a buffer: how many there were."""
        assert self._reader is None, "one reader at a time"
        if self.closed:
            raise LinkClosedError("the connection is closed")
        self._target, self._enough, self._got, self._arrived = target, enough, 0, arrived
        try:
            if expected and self._turn_bytes < _TURN_BYTES and self._pull():
                return self._got
            self._reader = self._loop.create_future()
            if not self._listens:
                self._loop.add_reader(self._socket, self._readable)
                self._listens = True
            self._turn_bytes = 0
            self._watch()
            await self._reader
        finally:
            self._reader, self._arrived, self._target = None, None, memoryview(b"")
        return self._got

    def _readable(self) -> None:
        """Something has arrived, or the peer has closed."""
        if self._reader is None or self._reader.done():
            # Nobody wants it now. The socket keeps it, and the peer stops when that is full.
            self._loop.remove_reader(self._socket)
            self._listens = False
            return
        self._turn_bytes = 0
        try:
            if self._pull():
                self._reader.set_result(None)
        except Exception as exc:
            self._reader.set_exception(exc)

    def _pull(self) -> bool:
        """Take from the socket what is there, as far as it is wanted and others need not wait: whether it is enough."""
        while self._got < self._enough and self._turn_bytes < _TURN_BYTES:
            try:
                received = self._socket.recv_into(self._target[self._got :] if self._got else self._target)
            except (BlockingIOError, InterruptedError):
                break
            if not received:
                raise LinkClosedError("the peer closed the connection")
            self._got += received
            self._turn_bytes += received
            if self._arrived is not None:
                self._arrived(received)
        return self._got >= self._enough

    def _writable(self) -> None:
        """The socket has room again."""
        assert self._writer is not None, "there is a writer as long as this is called"
        if self._writer.done():
            return
        try:
            sent = self._push()
        except OSError as exc:
            self._writer.set_exception(exc)
        else:
            if sent:
                self._writer.set_result(None)

    def _push(self) -> bool:
        """Give the socket what it takes: whether that is all."""
        turn_bytes = 0
        while self._unsent and turn_bytes < _TURN_BYTES:
            views = self._unsent[: -_VIEWS_MAX - 1 : -1]
            try:
                sent = self._socket.sendmsg(views)
            except (BlockingIOError, InterruptedError):
                return False
            turn_bytes += sent
            for view in views:
                if sent < len(view):
                    self._unsent[-1] = view[sent:]
                    break
                sent -= len(view)
                self._unsent.pop()
        return not self._unsent

    def _watch(self) -> None:
        """See to it that whoever begins to wait now does not wait too long."""
        if self._ends_s == math.inf:
            return
        if self._loop.time() >= self._ends_s:
            raise TimeoutError("the time is over")
        if self._timer is not None:
            if self._timer.when() <= self._ends_s:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(self._ends_s, self._expire)

    def _expire(self) -> None:
        """The time may be over."""
        self._timer = None
        if self._reader is None and self._writer is None:
            return
        try:
            self._watch()
        except TimeoutError as exc:
            self._fail(exc)

    def _fail(self, error: Exception) -> None:
        for waiting in (self._reader, self._writer):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)


@cache
def _large_options() -> list[int]:
    """Socket buffers that may be made large; where the limit is lower, the kernel's own choice is the better one."""
    limits = {option: Path("/proc/sys/net/core", name) for option, name in _SOCKET_LIMITS.items()}
    return [opt for opt, limit in limits.items() if limit.exists() and int(limit.read_text()) >= _SOCKET_BYTES]


def pack_message(number: int, body_bytes: int) -> bytes:
    """Head of a message: `number` is the length of a request's target, or an answer's status."""
    return _MESSAGE.pack(number, body_bytes)


def unpack_message(head: bytes) -> tuple[int, int]:
    """What `pack_message` was given."""
    number, body_bytes = _MESSAGE.unpack(head)
    return number, body_bytes
