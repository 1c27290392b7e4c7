"""Bodies on their way in: bounded in size, in time and in how many there are at once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import hdrs, web

from kvstore.config import ServerConfig
from kvstore.errors import BackendUnavailableError, MediaTypeError
from kvstore.frame import Frame, blob_frame
from kvstore.keys import ChunkKey
from kvstore.metrics import Metrics
from kvstore.wire import FRAME_TYPE, BodyReader, read_blob, read_frame

_SLOWEST_BYTES_PER_S = 1e6


class Receiver:
    """Reads request bodies within the limits of a configuration."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self.limit_bytes = config.body_bytes_max
        self._inflight_bytes_max = max(config.inflight_bytes_max, config.body_bytes_max)
        self._inflight_bytes = 0
        self._timeout_s = config.body_timeout_s
        self._metrics = metrics

    @asynccontextmanager
    async def body(self, request: web.Request, limit_bytes: int | None = None) -> AsyncIterator[BodyReader]:
        """The body of a request, for as long as it is read.

        Raises:
            BodySizeError: It is announced larger than the limit.
            MediaTypeError: It is encoded; what is stored here is compressed already.
            BackendUnavailableError: Too many bytes are in receipt already.
            TimeoutError: It arrives too slowly.
        """
        if hdrs.CONTENT_ENCODING in request.headers:
            raise MediaTypeError("send the body without Content-Encoding")
        limit_bytes = self.limit_bytes if limit_bytes is None else limit_bytes
        reserved_bytes = 0
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timeout_s

        def arrived(size_bytes: int) -> None:
            # What counts is what has come: an announcement alone must not keep others from sending.
            nonlocal reserved_bytes
            if self._inflight_bytes + size_bytes > self._inflight_bytes_max:
                raise BackendUnavailableError("server", f"{self._inflight_bytes} bytes are in receipt; try again")
            reserved_bytes += size_bytes
            self._inflight_bytes += size_bytes
            timeout.reschedule(deadline_s + reserved_bytes / _SLOWEST_BYTES_PER_S)

        try:
            async with asyncio.timeout_at(deadline_s) as timeout:
                yield BodyReader(request.content, limit_bytes, request.content_length, arrived)
        finally:
            self._inflight_bytes -= reserved_bytes
            self._metrics.received_bytes.inc(reserved_bytes)

    async def chunk(self, request: web.Request, key: ChunkKey) -> Frame:
        """The verified frame that a PUT brings for `key`; a body of another type is wrapped as an opaque blob.

        Raises:
            FrameError: The body is said to be a frame and is not a sound one of this key.
        """
        async with self.body(request) as reader:
            if request.content_type != FRAME_TYPE:
                buffer, length = await read_blob(reader)
                return blob_frame(key, buffer, length)
            frame = await read_frame(reader, reader.announced_bytes)
            await reader.end()
        frame.verify(key)
        return frame


def require_type(request: web.Request, content_type: str) -> None:
    """Refuse a body of another type; browsers cannot send this one from a foreign page unasked.

    Raises:
        MediaTypeError: The content type differs.
    """
    if request.content_type != content_type:
        raise MediaTypeError(f"this route takes {content_type}, not {request.content_type}")
