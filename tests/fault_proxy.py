"""A proxy in front of an HTTP server that does to requests what networks and overloaded servers do, from a seed.

One request a connection: the proxy asks the server to close afterwards, so it need not know where an answer ends.
"""

import asyncio
import random
import re
import socket
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

FAULTS = (
    "delay",
    "error",
    "slow_down",
    "refuse",
    "cut_request",
    "cut_answer",
    "lose_answer",
    "stall_request",
    "stall_answer",
    "throttle",
)
_PIECE_BYTES = 1 << 14


class FaultProxy:
    """Passes requests on, some of them badly.

    Attributes:
        share: Share of requests that a fault happens to.
        kinds: Faults to choose from.
        next: Faults of the next requests, whatever the share.
        down: Whether connections are cut as soon as they are made.
        delay_s: How long `delay` holds a request back; `late` does so with its answer, too.
        stall_s: How long `stall_...` keeps silent before it cuts the connection.
        rate_bytes_per_s: How fast `throttle` lets answers through.
        conditions: Whether the server knows conditional writes; else they are answered by status 501.
        hold: Requests whose first line has this in it wait for `release`; empty holds none.
        release: Lets the held requests go.
        happened: How often which fault happened.
        requests: First lines of requests, in order.
        answer_bytes: Bytes that the server answered.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self.share = 0.0
        self.kinds: tuple[str, ...] = FAULTS
        self.next: deque[str] = deque()
        self.down = False
        self.delay_s = 0.05
        self.stall_s = 3.0
        self.rate_bytes_per_s = 20_000.0
        self.conditions = True
        self.hold = ""
        self.release = asyncio.Event()
        self.happened: Counter[str] = Counter()
        self.requests: list[str] = []
        self.answer_bytes = 0
        self.url = ""
        self._port = port
        self._rng = random.Random(seed)
        self._connections: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            # Only `stop` cancels.
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def stop(self) -> None:
        """End every connection."""
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            return _reset(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(head.partition(b"\r\n")[0].decode())
        if self.hold and self.hold in self.requests[-1]:
            await self.release.wait()
        if not self.conditions and re.search(rb"(?i)\r\nif-(none-)?match:", head):
            return await _answer_error(writer, 501, "NotImplemented")
        fault = self._choose()
        if fault == "corrupt_answer" and (not head.startswith(b"GET") or b"list-type" in head):
            # Listings have no checksums, so nobody could know.
            fault = "none"
        if fault == "refuse":
            return _reset(writer)
        if fault == "error":
            return await _answer_error(writer, 500, "InternalError")
        if fault == "slow_down":
            return await _answer_error(writer, 503, "SlowDown")
        if fault in ("delay", "late"):
            await asyncio.sleep(self.delay_s)
        if reader._eof:  # type: ignore[attr-defined]
            # The client has gone, so nothing of this reaches the server any more.
            return None
        await self._pass_on(head, reader, writer, fault)
        return None

    async def _pass_on(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str
    ) -> None:
        found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        body_bytes = int(found[1]) if found else 0
        if not body_bytes and fault in ("cut_request", "stall_request"):
            await self._stop_at(fault)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            server_writer.write(re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n")
            sending = asyncio.create_task(self._send(reader, server_writer, body_bytes, fault))
            answering = asyncio.create_task(self._answer(server_reader, writer, fault))
            try:
                # A body that is cut ends the request; else the answer does.
                await asyncio.wait({answering, sending}, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for task in (sending, answering):
                    task.cancel()
                await asyncio.gather(sending, answering, return_exceptions=True)
        finally:
            # An answer that was passed on in full must arrive; anything else is cut.
            server_writer.transport.abort()

    async def _send(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter, left: int, fault: str) -> None:
        """Pass the body on, then watch for a client that gives up: its request must not go on without it."""
        cut_at = self._rng.randrange(left) if fault in ("cut_request", "stall_request") else None
        while left:
            if cut_at is not None and left <= cut_at:
                await self._stop_at(fault)
            piece = await reader.read(min(left, _PIECE_BYTES))
            if not piece:
                raise ConnectionAbortedError
            if fault == "corrupt_request":
                piece = _flip(piece)
            server.write(piece)
            await server.drain()
            left -= len(piece)
        await reader.read(1)
        raise ConnectionAbortedError

    async def _answer(self, server: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str) -> None:
        passed_bytes = 0
        cut_at = self._rng.randrange(100, 20_000) if fault in ("cut_answer", "stall_answer") else None
        while piece := await server.read(_PIECE_BYTES):
            self.answer_bytes += len(piece)
            if fault == "late" and not piece.startswith(b"HTTP/1.1 100"):
                await asyncio.sleep(self.delay_s)
            if fault == "lose_answer" and not piece.startswith(b"HTTP/1.1 100"):
                await self._stop_at(fault)
            if cut_at is not None and passed_bytes + len(piece) >= cut_at:
                writer.write(piece[: cut_at - passed_bytes])
                await writer.drain()
                await self._stop_at(fault)
            if fault == "throttle":
                await asyncio.sleep(len(piece) / self.rate_bytes_per_s)
            if fault == "corrupt_answer" and passed_bytes:
                # Not the first piece: a header of HTTP has no checksum.
                piece = _flip(piece)
            writer.write(piece)
            await writer.drain()
            passed_bytes += len(piece)
        writer.write_eof()
        # Closing at once could take the last bytes back.
        await asyncio.sleep(0.001)

    async def _stop_at(self, fault: str) -> None:
        if fault.startswith("stall"):
            await asyncio.sleep(self.stall_s)
        raise ConnectionAbortedError

    def _choose(self) -> str:
        fault = "none"
        if self.next:
            fault = self.next.popleft()
        elif self._rng.random() < self.share:
            fault = self._rng.choice(self.kinds)
        self.happened[fault] += 1
        return fault


@asynccontextmanager
async def fault_proxy(port: int, seed: int = 0) -> AsyncIterator[FaultProxy]:
    """A proxy in front of a loopback port, until the block is left."""
    proxy = FaultProxy(port, seed)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.stop()


async def _answer_error(writer: asyncio.StreamWriter, status: int, code: str) -> None:
    body = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    await writer.drain()
    writer.write_eof()
    # The client may still be sending; a reset would take the answer away from it.
    await asyncio.sleep(0.05)


def _flip(piece: bytes) -> bytes:
    return piece[:-1] + bytes([piece[-1] ^ 1])


def _reset(writer: asyncio.StreamWriter) -> None:
    """Cut a connection, so that the other side gets an error and no end."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
