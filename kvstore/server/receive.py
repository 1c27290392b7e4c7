"""Bodies on their way in: bounded in size, in time and in how many there are at once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from aiohttp import hdrs, web

from kvstore.backend import Miss
from kvstore.config import ServerConfig
from kvstore.errors import (
    BackendBusyError,
    BodySizeError,
    FrameCorruptError,
    KeyFormatError,
    LayoutMismatchError,
    MediaTypeError,
)
from kvstore.frame import Frame, blob_frame
from kvstore.keys import DIGEST_BYTES, ChunkKey
from kvstore.link import Link
from kvstore.link_body import LinkBody
from kvstore.metrics import Metrics
from kvstore.wire import (
    BATCH_TYPE,
    DIGESTS_TYPE,
    FRAME_TYPE,
    Arrived,
    Body,
    BodyReader,
    DamagedFrameError,
    read_batch,
    read_blob,
    read_frame,
)

SLOWEST_BYTES_PER_S = 1e6
"""A peer that sends or takes a body more slowly than this is not waited for."""
KEYS_MAX = 1 << 16
"""Keys of one request."""
FRAMES_MAX = 4096
"""Frames of one put."""
DIGESTS_BYTES_MAX = KEYS_MAX * DIGEST_BYTES


class Receiver:
    """Reads request bodies within the limits of a configuration.

    What has arrived counts against the limit of bytes in receipt until whoever asked for it is done with it: a put
    that waits for a disk holds its frames in memory, too.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self.limit_bytes = config.body_bytes_max
        self._inflight_bytes_max = max(config.inflight_bytes_max, config.body_bytes_max)
        self._inflight_bytes = 0
        self._timeout_s = config.body_timeout_s
        self._metrics = metrics

    @asynccontextmanager
    async def chunk(self, request: web.Request, key: ChunkKey) -> AsyncIterator[Frame]:
        """The verified frame that a PUT brings for `key`; a body of another type is wrapped as an opaque blob.

        Raises:
            FrameError: The body is said to be a frame and is not a sound one of this key.
        """
        with self._receipt() as receipt:
            async with self._reading(request, receipt, self.limit_bytes) as reader:
                if request.content_type == FRAME_TYPE:
                    frame = await read_frame(reader, reader.announced_bytes)
                    await reader.end()
                else:
                    frame = blob_frame(key, *await read_blob(reader))
            if frame.key != key:
                raise LayoutMismatchError("the frame's header names another key")
            yield frame

    @asynccontextmanager
    async def batch(self, request: web.Request) -> AsyncIterator[list[Frame]]:
        """The verified frames of a batch.

        Raises:
            MediaTypeError: The body is no batch.
            FrameError: A record is damaged, or a miss.
            BodySizeError: There are more than `FRAMES_MAX`.
        """
        require_type(request, BATCH_TYPE)
        with self._receipt() as receipt:
            async with self._reading(request, receipt, self.limit_bytes) as reader:
                frames = await _read_frames(reader)
            yield frames

    @asynccontextmanager
    async def link_batch(self, link: Link, body: LinkBody) -> AsyncIterator[list[Frame]]:
        """As `batch`, from a link."""
        with self._receipt() as receipt:
            with self._reading_link(link, body, receipt, self.limit_bytes):
                frames = await _read_frames(body)
            yield frames

    async def digests(self, request: web.Request) -> bytes:
        """The digests that a request names its keys by.

        Raises:
            MediaTypeError: The body is something else.
            KeyFormatError: It is not a sequence of digests.
        """
        require_type(request, DIGESTS_TYPE)
        with self._receipt() as receipt:
            async with self._reading(request, receipt, DIGESTS_BYTES_MAX) as reader:
                digests = b"".join([bytes(part) async for part in reader.parts()])
        return check_digests(digests)

    async def body(self, request: web.Request, content_type: str, limit_bytes: int) -> bytes:
        """A body as it is.

        Raises:
            MediaTypeError: It is something else.
            BodySizeError: It is larger than the limit.
        """
        require_type(request, content_type)
        with self._receipt() as receipt:
            async with self._reading(request, receipt, limit_bytes) as reader:
                return b"".join([bytes(part) async for part in reader.parts()])

    async def link_digests(self, link: Link, body: LinkBody) -> bytes:
        """As `digests`, from a link."""
        if (arrived := body.taken()) is not None:
            # It was not waited for, and took no more memory than the link has.
            self._metrics.received_bytes.inc(len(arrived))
            return check_digests(arrived)
        with self._receipt() as receipt, self._reading_link(link, body, receipt, DIGESTS_BYTES_MAX):
            return check_digests(await body.rest())

    @contextmanager
    def _receipt(self) -> Iterator["_Receipt"]:
        receipt = _Receipt()
        try:
            yield receipt
        finally:
            self._inflight_bytes -= receipt.size_bytes
            self._metrics.received_bytes.inc(receipt.size_bytes)

    @asynccontextmanager
    async def _reading(self, request: web.Request, receipt: "_Receipt", limit_bytes: int) -> AsyncIterator[BodyReader]:
        """The body of a request, for as long as it is read.

        Raises:
            BodySizeError: It is announced larger than the limit.
            MediaTypeError: It is encoded; what is stored here is compressed already.
            BackendBusyError: Too many bytes are in receipt already.
            TimeoutError: It arrives too slowly.
        """
        if hdrs.CONTENT_ENCODING in request.headers:
            raise MediaTypeError("send the body without Content-Encoding")
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        async with asyncio.timeout_at(deadline_s) as timeout:
            arrived = self._counting(receipt, deadline_s, timeout.reschedule)
            yield BodyReader(request.content, limit_bytes, request.content_length, arrived)

    @contextmanager
    def _reading_link(self, link: Link, body: LinkBody, receipt: "_Receipt", limit_bytes: int) -> Iterator[None]:
        """As `_reading`, on a link."""
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        with link.limited(deadline_s):
            body.bound(limit_bytes, self._counting(receipt, deadline_s, link.reschedule))
            yield

    def _counting(self, receipt: "_Receipt", deadline_s: float, reschedule: Callable[[float], None]) -> Arrived:
        """Counts what arrives, and moves the deadline by it."""

        def arrived(size_bytes: int) -> None:
            # What counts is what has come: an announcement alone must not keep others from sending.
            if self._inflight_bytes + size_bytes > self._inflight_bytes_max:
                raise BackendBusyError("server", f"{self._inflight_bytes} bytes are in receipt; try again")
            receipt.size_bytes += size_bytes
            self._inflight_bytes += size_bytes
            reschedule(deadline_s + receipt.size_bytes / SLOWEST_BYTES_PER_S)

        return arrived


@dataclass(slots=True)
class _Receipt:
    """Bytes of one body that count as being in receipt."""

    size_bytes: int = 0


def check_digests(body: bytes) -> bytes:
    """A body that names keys, as it is.

    Raises:
        KeyFormatError: It is not a sequence of digests.
    """
    if len(body) % DIGEST_BYTES:
        raise KeyFormatError(f"the body must be digests of {DIGEST_BYTES} bytes each")
    return body


async def _read_frames(body: Body) -> list[Frame]:
    """The verified frames of a batch."""
    frames: list[Frame] = []
    async for record in read_batch(body):
        if isinstance(record, Miss):
            raise FrameCorruptError("a put brings frames, not misses")
        if isinstance(record, DamagedFrameError):
            raise record
        if len(frames) == FRAMES_MAX:
            raise BodySizeError(f"a batch has at most {FRAMES_MAX} frames")
        frames.append(record)
    return frames


def require_type(request: web.Request, content_type: str) -> None:
    """Refuse a body of another type; browsers cannot send this one from a foreign page unasked.

    Raises:
        MediaTypeError: The content type differs.
    """
    if request.content_type != content_type:
        raise MediaTypeError(f"this route takes {content_type}, not {request.content_type}")
