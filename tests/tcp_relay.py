"""A relay in front of a TCP port that knows no protocol: after so many bytes of answers it damages, cuts or stalls."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Relay:
    """Passes bytes on.

    Attributes:
        fault: What happens to answers once `after_bytes` have passed: `flip` a byte once, `cut` or `stall` the
            connection, or nothing.
        after_bytes: Bytes of answers until then, counted from the moment it is set.
        answer_bytes: Bytes of answers that passed.
        rate_bytes_per_s: How fast answers pass; 0 is without a limit.
        port: Where new connections go.
    """

    def __init__(self, port: int) -> None:
        self.fault = ""
        self.after_bytes = 0
        self.answer_bytes = 0
        self.rate_bytes_per_s = 0.0
        self.port = port
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with suppress(OSError, asyncio.CancelledError):
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.port)
            asking = asyncio.create_task(self._pass(reader, server_writer))
            try:
                await self._answer(server_reader, writer)
            finally:
                asking.cancel()
                server_writer.transport.abort()
        self._tasks.discard(task)
        writer.transport.abort()

    async def stop(self) -> None:
        """End every connection."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(1 << 16):
                writer.write(piece)
                await writer.drain()
            writer.write_eof()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(1 << 14):
            self.answer_bytes += len(piece)
            self.after_bytes -= len(piece)
            if self.fault and self.after_bytes < 0:
                piece = await self._spoil(piece)
            if self.rate_bytes_per_s:
                await asyncio.sleep(len(piece) / self.rate_bytes_per_s)
            writer.write(piece)
            await writer.drain()
        writer.write_eof()

    async def _spoil(self, piece: bytes) -> bytes:
        if self.fault == "cut":
            raise ConnectionAbortedError
        if self.fault == "stall":
            await asyncio.sleep(3600)
        self.fault = ""
        return piece[:-1] + bytes([piece[-1] ^ 1])


@asynccontextmanager
async def tcp_relay(port: int) -> AsyncIterator[Relay]:
    """A relay in front of a loopback port, until the block is left."""
    relay = Relay(port)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    relay.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield relay
    finally:
        server.close()
        await relay.stop()
