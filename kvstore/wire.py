"""Frames on an HTTP connection: read into one buffer a level, written from views; batches as records.

A batch body is a sequence of records: kind (1 byte: 0 frame, 1 miss), 7 zero bytes, length (8 bytes, little-endian),
then that many bytes: a frame, or the reason of a miss as ASCII. Nothing is ever joined into one byte string.
"""

import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Protocol

from aiohttp import StreamReader, payload
from aiohttp.abc import AbstractStreamWriter
from xxhash import xxh3_64, xxh3_64_intdigest

from kvstore.backend import Miss, Reason
from kvstore.buffers import allocate
from kvstore.errors import BodyLengthError, BodySizeError, FrameCorruptError
from kvstore.frame import (
    HEAD_BYTES_MAX,
    PREFIX_BYTES,
    Frame,
    Head,
    head_bytes,
    key_seed,
    padded_bytes,
    parse_head,
)

FRAME_TYPE = "application/vnd.kvstore.frame"
BATCH_TYPE = "application/vnd.kvstore.batch"
DIGESTS_TYPE = "application/vnd.kvstore.digests"
BLOB_TYPE = "application/octet-stream"

RECORD_BYTES = 16
WRITE_BYTES = 1 << 20
"""Bytes handed to the transport at one time: what the socket does not take at once, the transport copies."""

READ_BYTES = 1 << 20
"""Bytes that may wait on a connection before the peer is told to stop sending."""

_RECORD = struct.Struct("<B7xQ")
_KIND_FRAME, _KIND_MISS = 0, 1
_MISS_BYTES_MAX = 64

Send = Callable[[memoryview], Awaitable[None]]
Arrived = Callable[[int], None]


class Body(Protocol):
    """A body as it arrives, in the pieces that its reader asks for."""

    @property
    def left_bytes(self) -> int:
        """Bytes that may still come."""
        ...

    async def at_end(self) -> bool:
        """Whether the body has ended."""
        ...

    async def fill(self, buffer: memoryview, filled: Arrived | None = None) -> None:
        """Fill a buffer, telling `filled` of more and more bytes of it, or raise `BodyLengthError`."""
        ...

    async def take(self, size_bytes: int) -> bytes:
        """Exactly that many bytes, or `BodyLengthError`; the caller has bounded the number."""
        ...


class DamagedFrameError(FrameCorruptError):
    """A segment of a frame that was read to its end does not match its checksum."""


class BodyReader:
    """The body of an HTTP message.

    Args:
        stream: The body as it arrives.
        limit_bytes: More than this is refused.
        announced_bytes: Length that the peer announced, None where it announced none.
        arrived: Called with the number of bytes whenever some arrive; may refuse them by raising.

    Raises:
        BodySizeError: The announced length is over the limit.
    """

    def __init__(
        self,
        stream: StreamReader,
        limit_bytes: int,
        announced_bytes: int | None,
        arrived: Arrived | None = None,
    ) -> None:
        if announced_bytes is not None and announced_bytes > limit_bytes:
            raise BodySizeError(f"a body of {announced_bytes} bytes is over the limit of {limit_bytes}")
        self._stream = stream
        self._limit_bytes = limit_bytes
        self._arrived = arrived
        self._rest = memoryview(b"")
        self.announced_bytes = announced_bytes
        self.read_bytes = 0

    @property
    def left_bytes(self) -> int:
        """Bytes that may still come."""
        most = self._limit_bytes if self.announced_bytes is None else self.announced_bytes
        return most - self.read_bytes

    async def at_end(self) -> bool:
        """Whether the body has ended."""
        return not self._rest and not await self._refill()

    async def fill(self, buffer: memoryview, filled: Arrived | None = None) -> None:
        """Fill a buffer.

        Args:
            buffer: What to fill.
            filled: Called with the number of bytes whenever some more of it are filled.

        Raises:
            BodyLengthError: The body ends before the buffer is full.
        """
        start = 0
        while start < len(buffer):
            if not self._rest and not await self._refill():
                raise BodyLengthError(f"the body ends after {self.read_bytes} bytes, more were announced")
            part = self._rest[: len(buffer) - start]
            buffer[start : start + len(part)] = part
            self._rest = self._rest[len(part) :]
            self.read_bytes += len(part)
            start += len(part)
            self._check_limit()
            if filled is not None:
                filled(len(part))

    async def take(self, size_bytes: int) -> bytes:
        """Exactly that many bytes; the caller has bounded the number.

        Raises:
            BodyLengthError: The body ends before.
        """
        buffer = bytearray(size_bytes)
        await self.fill(memoryview(buffer))
        return bytes(buffer)

    async def parts(self) -> AsyncIterator[memoryview]:
        """The rest of the body as it arrives.

        Raises:
            BodySizeError: It goes beyond the limit.
        """
        while not await self.at_end():
            part, self._rest = self._rest, memoryview(b"")
            self.read_bytes += len(part)
            self._check_limit()
            yield part

    async def end(self) -> None:
        """Check that nothing follows.

        Raises:
            BodyLengthError: The body goes on.
        """
        if not await self.at_end():
            raise BodyLengthError(f"the body goes on after {self.read_bytes} bytes")

    async def _refill(self) -> bool:
        while not self._stream.at_eof():
            data, _ = await self._stream.readchunk()
            if data:
                self._rest = memoryview(data)
                if self._arrived is not None:
                    self._arrived(len(data))
                return True
        return False

    def _check_limit(self) -> None:
        if self.left_bytes < 0:
            raise BodySizeError(f"the body is over the limit of {self._limit_bytes} bytes")


async def read_frame(body: Body, size_bytes: int | None) -> Frame:
    """Read one frame: its head first, then one buffer for each level that is there; verified as it arrives.

    Args:
        body: Where it comes from.
        size_bytes: Its length, None where it ends with the body.

    Raises:
        FrameError: The head is damaged, or the length is not the end of a level.
        DamagedFrameError: It has been read to its end, and a segment does not match its checksum.
        BodySizeError: The frame is larger than the body may be.
        BodyLengthError: The body ends early.
    """
    head = await _read_head(body, size_bytes)
    checking = _Checking(head)
    if size_bytes is not None:
        levels = head.held_levels(size_bytes - len(head.raw))
        frame = Frame(head, tuple([await _read_level(body, size, checking) for size in head.level_bytes[:levels]]))
    else:
        payload_views = [await _read_level(body, head.level_bytes[0], checking)]
        for level_bytes in head.level_bytes[1:]:
            if await body.at_end():
                break
            payload_views.append(await _read_level(body, level_bytes, checking))
        frame = Frame(head, tuple(payload_views))
    if not checking.sound:
        raise DamagedFrameError("a segment does not match its checksum")
    return frame


async def read_blob(body: BodyReader) -> tuple[memoryview, int]:
    """Read a body of any length into one buffer with room for a segment's padding: the buffer, and the length.

    Raises:
        BodySizeError: It is larger than the body may be.
        BodyLengthError: The body ends early.
    """
    if body.announced_bytes is not None:
        buffer = allocate(padded_bytes(body.announced_bytes))
        await body.fill(buffer[: body.announced_bytes])
        await body.end()
        return buffer, body.announced_bytes
    grown = bytearray()
    async for part in body.parts():
        grown += part
    length = len(grown)
    grown += bytes(padded_bytes(length) - length)
    return memoryview(grown), length


async def read_batch(body: Body) -> AsyncIterator[Frame | Miss | DamagedFrameError]:
    """Read a batch: verified frames, misses, and what is wrong with a damaged one, each as soon as it is complete.

    Raises:
        FrameError: A record or a frame in it is damaged.
        BodySizeError: A frame is larger than the body may be.
        BodyLengthError: The body ends early.
    """
    while not await body.at_end():
        kind, size_bytes = _RECORD.unpack(await body.take(RECORD_BYTES))
        if kind == _KIND_FRAME:
            try:
                yield await read_frame(body, size_bytes)
            except DamagedFrameError as exc:
                # Where the next record begins is known.
                yield exc
        elif kind == _KIND_MISS and size_bytes <= _MISS_BYTES_MAX:
            yield parse_miss(await body.take(size_bytes))
        else:
            raise FrameCorruptError(f"a batch record of kind {kind} with {size_bytes} bytes is unknown")


def batch_views(records: Iterable[Frame | Miss]) -> Iterator[memoryview]:
    """The bytes of a batch as views, in order."""
    for record in records:
        if isinstance(record, Frame):
            yield memoryview(_RECORD.pack(_KIND_FRAME, record.size_bytes))
            yield from record.buffers()
        else:
            reason = record.reason.value.encode("ascii")
            yield memoryview(_RECORD.pack(_KIND_MISS, len(reason)) + reason)


async def send_views(send: Send, views: Iterable[memoryview]) -> None:
    """Send views one after another, each in pieces of at most `WRITE_BYTES`."""
    for view in views:
        for start in range(0, len(view), WRITE_BYTES):
            await send(view[start : start + WRITE_BYTES])


def total_bytes(views: Iterable[memoryview]) -> int:
    """Bytes of all views together."""
    return sum(len(view) for view in views)


class ViewsPayload(payload.Payload):
    """A request body that is written from views. It can be written again, for a connection that was stale."""

    def __init__(self, views: list[memoryview], content_type: str) -> None:
        super().__init__(views, content_type=content_type)
        self._views = views
        self._size = total_bytes(views)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Unsupported: a body of frames is not text."""
        raise TypeError("a body of frames is not text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Write all views."""
        await send_views(writer.write, self._views)


async def _read_head(body: Body, size_bytes: int | None) -> Head:
    if size_bytes is not None and size_bytes > body.left_bytes:
        raise BodySizeError(f"a frame of {size_bytes} bytes does not fit into the {body.left_bytes} that may come")
    prefix = await body.take(PREFIX_BYTES)
    length = head_bytes(prefix)
    assert length <= HEAD_BYTES_MAX, "head_bytes checks its bounds"
    head = parse_head(prefix + await body.take(length - PREFIX_BYTES))
    if sum(head.level_bytes) > body.left_bytes and size_bytes is None:
        raise BodySizeError(f"a payload of {sum(head.level_bytes)} bytes is over the limit")
    return head


async def _read_level(body: Body, size_bytes: int, checking: "_Checking") -> memoryview:
    buffer = allocate(size_bytes)
    await body.fill(buffer, checking.begin(buffer))
    return buffer


class _Checking:
    """Compares segments with their checksums while they arrive, while the peer sends what follows.

    Args:
        head: Head of the frame.
    """

    def __init__(self, head: Head) -> None:
        self._seed = key_seed(head.header.key)
        # No byte ever arrives of the empty ones.
        self._table = iter([segment for segment in head.segments if segment.length])
        self.sound = all(xxh3_64_intdigest(b"", self._seed) == checksum for _, n, checksum in head.segments if not n)
        self._level = memoryview(b"")
        self._start_bytes = 0
        self._filled = self._hashed = self._end = 0

    def begin(self, level: memoryview) -> Arrived:
        """Start on the next level; call what is returned with the number of bytes whenever some more are there."""
        self._start_bytes += len(self._level)
        self._level = level
        self._filled = self._hashed = self._end = 0
        return self._note

    def _note(self, size_bytes: int) -> None:
        self._filled += size_bytes
        while self._hashed < self._filled:
            if self._hashed == self._end:
                self._segment = next(self._table)
                self._end += padded_bytes(self._segment.length)
                self._digest = xxh3_64(seed=self._seed)
            end = min(self._end, self._filled)
            self._digest.update(self._level[self._hashed : end])
            self._hashed = end
            if end == self._end:
                padding = self._level[self._segment.offset - self._start_bytes + self._segment.length : end]
                self.sound &= self._digest.intdigest() == self._segment.checksum and not any(padding)


def parse_miss(text: bytes) -> Miss:
    """A miss from the text of its reason; one that is unknown here is `absent`."""
    try:
        return Miss(Reason(text.decode("ascii")))
    except ValueError:
        # A newer server may know reasons that this client does not.
        return Miss(Reason.ABSENT)
