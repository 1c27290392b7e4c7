"""The answer of a fetch: one stream of segments, every chunk's coarse levels before anybody's finer ones.

A record is a header of 32 bytes and a payload. Heads of all chunks come first, then the segments of all chunks ordered
by (level, layer group, chunk, plane). Wherever the stream is cut, the levels before are complete, and inside a level
layer groups can be decoded while later ones arrive. docs/http.md is the specification.
"""

import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import NamedTuple

from aiohttp import ClientError
from xxhash import xxh3_64_intdigest

from kvstore.backend import Miss, Reason
from kvstore.buffers import allocate
from kvstore.errors import (
    BodyLengthError,
    BodySizeError,
    FrameCorruptError,
    FrameError,
    FrameVersionError,
    RequestError,
)
from kvstore.frame import HEAD_BYTES_MAX, Frame, Head, key_seed, padded_bytes, parse_head
from kvstore.keys import ChunkKey
from kvstore.wire import BodyReader, parse_miss

STREAM_TYPE = "application/vnd.kvstore.stream"
KEYS_MAX = 1024
"""Chunks of one stream."""

_RECORD = struct.Struct("<BBHIIIQQ")
_HEAD, _MISS, _SEGMENT = range(3)
_MISS_BYTES_MAX = 64
_JOINED_BYTES = 256 << 10
_SMALL_BYTES = 32 << 10

RECORD_BYTES = _RECORD.size


class Record(NamedTuple):
    """Header of a record.

    Args:
        kind: 0 head, 1 miss, 2 segment.
        level: Level of a segment; of a head, the number of levels that follow.
        group: Layer group of a segment.
        chunk: Position of the chunk among the keys that were asked for.
        plane: Position of the plane among those of its level.
        zero: Nothing.
        size_bytes: Length of the payload; a segment's includes its padding.
        checksum: Of a segment, as the head's segment table has it.
    """

    kind: int
    level: int
    group: int
    chunk: int
    plane: int
    zero: int
    size_bytes: int
    checksum: int


class Arrived(NamedTuple):
    """A segment that has arrived and been verified.

    Args:
        chunk: Position of its chunk among the keys that were asked for.
        level: Quality level.
        group: Layer group.
        plane: Name of the coded plane.
        data: Its bytes, without padding.
    """

    chunk: int
    level: int
    group: int
    plane: str
    data: memoryview


class Fetched(NamedTuple):
    """The leading run of chunks that came, each with the levels that are complete, and why it ends there.

    Args:
        frames: Frames, one for each of the first keys.
        miss: Why no more chunks came; None where all did.
        cut: Why the frames have fewer levels than they might; None where the answer came whole.
    """

    frames: list[Frame]
    miss: Miss | None
    cut: Miss | None = None


def stream_bytes(frames: Sequence[Frame], miss: Miss | None) -> int:
    """Length of a stream."""
    records = sum(1 + sum(frame.head.header.segment_counts()[: frame.levels]) for frame in frames)
    size_bytes = records * RECORD_BYTES + sum(frame.size_bytes for frame in frames)
    return size_bytes if miss is None else size_bytes + RECORD_BYTES + len(miss.reason.value)


def stream_views(frames: Sequence[Frame], miss: Miss | None) -> Iterator[memoryview]:
    """The bytes of a stream: large segments as views, small ones joined.

    Args:
        frames: The leading chunks of those that were asked for.
        miss: Why the next one is not there; None where none follows, or nobody looked.
    """
    small: list[bytes | memoryview] = []
    small_bytes = 0
    for view in _pieces(frames, miss):
        if len(view) >= _SMALL_BYTES or small_bytes >= _JOINED_BYTES:
            yield memoryview(b"".join(small))
            small, small_bytes = [], 0
        if len(view) >= _SMALL_BYTES:
            yield memoryview(view)
        else:
            small.append(view)
            small_bytes += len(view)
    yield memoryview(b"".join(small))


def _pieces(frames: Sequence[Frame], miss: Miss | None) -> Iterator[bytes | memoryview]:
    for chunk, frame in enumerate(frames):
        yield _RECORD.pack(_HEAD, frame.levels, 0, chunk, 0, 0, len(frame.head.raw), 0)
        yield frame.head.raw
    if miss is not None:
        reason = miss.reason.value.encode("ascii")
        yield _RECORD.pack(_MISS, 0, 0, len(frames), 0, 0, len(reason), 0) + reason
    heads = [(frame.head, frame.levels) for frame in frames]
    for record, start, _ in _order(heads):
        yield _RECORD.pack(*record)
        yield frames[record.chunk].payload[record.level][start : start + record.size_bytes]


def _order(heads: Sequence[tuple[Head, int]]) -> Iterator[tuple[Record, int, int]]:
    """Records of the segments of some chunks with their levels, in order.

    Each comes with its place in its level's payload, and its length without padding.
    """
    first_rows = [0] * len(heads)
    for level in range(max((levels for _, levels in heads), default=0)):
        held = [(chunk, head) for chunk, (head, levels) in enumerate(heads) if level < levels]
        starts = {chunk: head.segments[first_rows[chunk]].offset for chunk, head in held}
        for group in range(max(len(head.header.groups) for _, head in held)):
            for chunk, head in held:
                planes = len(head.header.planes[level])
                row = first_rows[chunk] + group * planes
                for plane in range(planes if group < len(head.header.groups) else 0):
                    offset, length, checksum = head.segments[row + plane]
                    record = Record(_SEGMENT, level, group, chunk, plane, 0, padded_bytes(length), checksum)
                    yield record, offset - starts[chunk], length
        for chunk, head in held:
            first_rows[chunk] += len(head.header.groups) * len(head.header.planes[level])


class Fetch:
    """A fetch under way: iterate over its segments, and ask at any time for what is complete.

    The iteration ends with the stream, or where that breaks off; it raises nothing. What is complete by then stays.

    Args:
        body: The stream.
        keys: Keys that were asked for.
    """

    def __init__(self, body: BodyReader, keys: Sequence[ChunkKey]) -> None:
        self._body = body
        self._keys = keys
        self._heads: list[tuple[Head, int]] = []
        self._seeds: list[int] = []
        self._payloads: list[list[memoryview]] = []
        self._complete: list[int] = []
        self._damaged: set[int] = set()
        self._miss: Miss | None = None
        self._next: Record | None = None
        self._cut: Miss | None = Miss(Reason.DEADLINE)

    @property
    def heads(self) -> Sequence[Head]:
        """Heads of the chunks that come; complete once the first segment has come."""
        return [head for head, _ in self._heads]

    def coming(self, chunk: int) -> tuple[Head, int]:
        """Head of a chunk that comes, and how many levels of it."""
        return self._heads[chunk]

    def __aiter__(self) -> AsyncIterator[Arrived]:
        return self._segments()

    def fetched(self) -> Fetched:
        """The chunks that have level 0 by now, with all their complete levels."""
        frames = []
        for (head, _), payload, complete in zip(self._heads, self._payloads, self._complete, strict=True):
            if not complete:
                break
            frames.append(Frame(head, tuple(payload[:complete])))
        if len(frames) == len(self._heads) and (self._miss is not None or frames):
            return Fetched(frames, self._miss, self._cut)
        damaged = len(frames) in self._damaged
        return Fetched(frames, Miss(Reason.CORRUPT) if damaged else self._cut, self._cut)

    async def _segments(self) -> AsyncIterator[Arrived]:
        try:
            await self._read_heads()
            for record, start, length in _order(self._heads):
                if (arrived := await self._read_segment(record, start, length)) is not None:
                    yield arrived
            if not await self._body.at_end():
                raise BodyLengthError("the stream goes on behind its last segment")
            self._cut = Miss(Reason.CORRUPT) if self._damaged else None
        except FrameVersionError:
            self._cut = Miss(Reason.IDENTITY)
        except (FrameError, RequestError):
            self._cut = Miss(Reason.CORRUPT)
        except TimeoutError:
            self._cut = Miss(Reason.DEADLINE)
        except (ClientError, OSError):
            self._cut = Miss(Reason.BREAKER)

    async def _read_heads(self) -> None:
        """Read up to the first segment.

        Raises:
            FrameError: A record is not what may stand there, or a head is damaged or another's.
            BodySizeError: The chunks are said to be larger than the stream may be.
        """
        promised_bytes = 0
        while not await self._body.at_end():
            record = Record(*_RECORD.unpack(await self._body.take(RECORD_BYTES)))
            if record.kind == _SEGMENT:
                self._next = record
                break
            if record.chunk != len(self._heads) or self._miss is not None or len(self._heads) == len(self._keys):
                raise FrameCorruptError(f"a record of chunk {record.chunk} does not follow here")
            if record.kind == _MISS and record.size_bytes <= _MISS_BYTES_MAX:
                self._miss = parse_miss(await self._body.take(record.size_bytes))
            elif record.kind == _HEAD and record.size_bytes <= HEAD_BYTES_MAX:
                promised_bytes += self._take_head(record, await self._body.take(record.size_bytes))
            else:
                raise FrameCorruptError(f"a record of kind {record.kind} with {record.size_bytes} bytes is unknown")
            if promised_bytes > self._body.left_bytes:
                raise BodySizeError(f"{promised_bytes} bytes of chunks do not fit into what may come")
        if not self._heads and self._miss is None:
            raise FrameCorruptError("the stream answers nothing")

    def _take_head(self, record: Record, raw: bytes) -> int:
        """Take a head in, and say how many bytes of segments belong to it."""
        head = parse_head(raw)
        if head.header.key != self._keys[record.chunk]:
            raise FrameCorruptError("a head names another key than the one asked for")
        if not 0 < record.level <= head.header.levels:
            raise FrameCorruptError(f"a chunk of {head.header.levels} levels cannot have {record.level}")
        self._heads.append((head, record.level))
        self._seeds.append(key_seed(head.header.key))
        self._payloads.append([])
        self._complete.append(0)
        return sum(head.level_bytes[: record.level])

    async def _read_segment(self, expected: Record, start: int, length: int) -> Arrived | None:
        """The next segment; None where it, or another of its chunk's, is damaged.

        Raises:
            FrameCorruptError: The record is another than the heads announce.
            BodyLengthError: The stream ends here.
        """
        record = self._next or Record(*_RECORD.unpack(await self._body.take(RECORD_BYTES)))
        self._next = None
        if record != expected:
            raise FrameCorruptError(f"{record} stands where {expected} should")
        _, level, group, chunk, plane, _, size_bytes, checksum = record
        head, payload = self._heads[chunk][0], self._payloads[chunk]
        if len(payload) == level:
            payload.append(allocate(head.level_bytes[level]))
        padded = payload[level][start : start + size_bytes]
        await self._body.fill(padded)
        if xxh3_64_intdigest(padded, self._seeds[chunk]) != checksum or any(padded[length:]):
            self._damaged.add(chunk)
        if chunk in self._damaged:
            return None
        names = head.header.planes[level]
        if group == len(head.header.groups) - 1 and plane == len(names) - 1:
            self._complete[chunk] = level + 1
        return Arrived(chunk, level, group, names[plane], padded[:length])


def joined(parts: Iterable[Fetched]) -> Fetched:
    """One run from those of streams that follow each other."""
    frames: list[Frame] = []
    miss: Miss | None = None
    cut: Miss | None = None
    for part in parts:
        frames += part.frames
        miss, cut = part.miss, cut or part.cut
    return Fetched(frames, miss, cut)
