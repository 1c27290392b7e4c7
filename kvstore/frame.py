"""Frame format version 1: one encoded chunk, at rest or in flight.

    prefix (40 bytes) | JSON header | segment table (24 bytes a segment) | segments, level by level

A frame cut at the end of a level is a valid frame of lower quality; any other length is damage. Every segment's
xxh3-64 is seeded by the key that the header names, so a segment that belongs elsewhere never passes for this one.
docs/format.md is the specification.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from kvstore.buffers import allocate
from kvstore.errors import FrameCorruptError, FrameVersionError, LayoutMismatchError
from kvstore.header import HEADER_BYTES_MAX, Header, blob_header, dump_header, load_header
from kvstore.keys import ChunkKey

MAGIC = b"\x89KVF\r\n\x1a\n"
VERSION = 1
ALIGNMENT = 16
"""Every segment is padded with zeros to a multiple of this many bytes."""
HEAD_ALIGNMENT = 64
"""The payload starts at a multiple of this many bytes."""
SEGMENTS_MAX = 1 << 14
PAYLOAD_BYTES_MAX = 1 << 40
HEAD_BYTES_MAX = 40 + HEADER_BYTES_MAX + 24 * SEGMENTS_MAX

# What parsed heads take in memory; see `Frame.memory_bytes`.
_FRAME_BYTES = 2048
_SEGMENT_BYTES = 160
_JSON_VALUE_BYTES = 80

_PREFIX = struct.Struct("<8sHHIIIQQ")
_CHECKSUM_OFFSET = 32
_SEGMENT = struct.Struct("<QQQ")
PREFIX_BYTES = _PREFIX.size

Buffer = bytes | bytearray | memoryview


class Segment(NamedTuple):
    """Where a coded plane of a layer group lies in the payload: bytes, and the xxh3-64 of its padded bytes."""

    offset: int
    length: int
    checksum: int


@dataclass(frozen=True)
class Head:
    """All of a frame but its payload: raw bytes, header and segment table."""

    raw: bytes
    header: Header
    segments: tuple[Segment, ...]

    @cached_property
    def id(self) -> bytes:
        """16 bytes of SHA-256 over prefix, header and segment table."""
        return hashlib.sha256(self.raw).digest()[:16]

    @cached_property
    def level_bytes(self) -> tuple[int, ...]:
        """Payload bytes of every level, padding included."""
        ends = [self.segments[end - 1] for end in accumulate(self.header.segment_counts())]
        offsets = [0] + [padded_bytes(segment.offset + segment.length) for segment in ends]
        return tuple(after - before for before, after in pairwise(offsets))

    def held_levels(self, payload_bytes: int) -> int:
        """Number of levels in a payload of that many bytes.

        Raises:
            FrameCorruptError: The length is not the end of a level.
        """
        for levels, end in enumerate(accumulate(self.level_bytes), start=1):
            if end == payload_bytes:
                return levels
        raise FrameCorruptError(f"{payload_bytes} payload bytes do not end at the end of a level")


@dataclass(frozen=True)
class Frame:
    """One encoded chunk with the levels that are held.

    Args:
        head: Prefix, header and segment table; always whole.
        payload: One buffer for each held level. Nobody writes to them once the frame exists.
    """

    head: Head
    payload: tuple[memoryview, ...]

    @property
    def key(self) -> ChunkKey:
        """Key that the header names."""
        return self.head.header.key

    @property
    def id(self) -> bytes:
        """Identity of the encoded chunk, the same for every number of held levels."""
        return self.head.id

    @property
    def levels(self) -> int:
        """Number of levels that are held; at most `head.header.levels`."""
        return len(self.payload)

    @property
    def whole(self) -> bool:
        """Whether every level is held."""
        return self.levels == self.head.header.levels

    @property
    def size_bytes(self) -> int:
        """Bytes of the frame as it is sent or kept."""
        return len(self.head.raw) + sum(len(level) for level in self.payload)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the frame takes in memory: its own, and what its parsed head takes as Python objects.

        The second part is an estimate. Without it, small frames with large heads could take many times a budget.
        """
        values = sum(self.head.raw.count(mark) for mark in (b",", b"[", b"{"))
        return self.size_bytes + _FRAME_BYTES + _SEGMENT_BYTES * len(self.head.segments) + _JSON_VALUE_BYTES * values

    def truncated(self, level: int | None) -> "Frame":
        """The frame with levels 0 to `level` only (None: all that are held); nothing is copied."""
        if level is None or level + 1 >= self.levels:
            return self
        return Frame(self.head, self.payload[: level + 1])

    def buffers(self) -> Iterator[memoryview]:
        """The frame's bytes in order, as views."""
        yield memoryview(self.head.raw)
        yield from self.payload

    def segments(self) -> Iterator[tuple[int, int, str, memoryview]]:
        """Level, layer group, plane name and bytes (without padding) of every held segment, in order."""
        table = iter(self.head.segments)
        start = 0
        for level, view in enumerate(self.payload):
            for group in range(len(self.head.header.groups)):
                for name in self.head.header.planes[level]:
                    offset, length, _ = next(table)
                    yield level, group, name, view[offset - start : offset - start + length]
            start += len(view)

    def verify(self, key: ChunkKey | None = None) -> None:
        """Check every held segment against its checksum, and the key where one is given.

        Raises:
            LayoutMismatchError: The header names another key.
            FrameCorruptError: A level has a wrong length or a segment a wrong checksum.
        """
        if key is not None and key != self.key:
            raise LayoutMismatchError("the frame's header names another key")
        expected_bytes = self.head.level_bytes[: self.levels]
        if not self.payload or tuple(len(view) for view in self.payload) != expected_bytes:
            raise FrameCorruptError("the payload does not have the length of its levels")
        seed = key_seed(self.key)
        for (_, length, checksum), padded in zip(self.head.segments, self._padded_segments(), strict=False):
            if xxh3_64_intdigest(padded, seed) != checksum or any(padded[length:]):
                raise FrameCorruptError("a segment does not match its checksum")

    def _padded_segments(self) -> Iterator[memoryview]:
        table = iter(self.head.segments)
        start = 0
        for view, count in zip(self.payload, self.head.header.segment_counts(), strict=False):
            for _ in range(count):
                offset, length, _ = next(table)
                yield view[offset - start : padded_bytes(offset - start + length)]
            start += len(view)


def padded_bytes(length: int) -> int:
    """Bytes that a segment of `length` bytes takes in the payload."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def key_seed(key: ChunkKey) -> int:
    """Seed of the checksums of a chunk's segments."""
    return xxh3_64_intdigest(key)


def pack_frame(header: Header, segments: Sequence[Buffer]) -> Frame:
    """Frame from its header and the bytes of its segments in `(level, layer group, plane)` order.

    Raises:
        ValueError: The number of segments is not what the header says.
    """
    counts = header.segment_counts()
    if sum(counts) != len(segments):
        raise ValueError(f"the header asks for {sum(counts)} segments, not {len(segments)}")
    queue = iter(segments)
    levels = [[next(queue) for _ in range(count)] for count in counts]
    return frame_around(
        header,
        [_join_padded(parts) for parts in levels],
        [[len(memoryview(part).cast("B")) for part in parts] for parts in levels],
    )


def frame_around(header: Header, payload: Sequence[memoryview], lengths: Sequence[Sequence[int]]) -> Frame:
    """Frame around payload buffers that already lie in their final form.

    Args:
        header: The header.
        payload: One buffer a level: segments in order, each padded with zeros to `ALIGNMENT`.
        lengths: Bytes of every segment of every level, without padding.
    """
    seed = key_seed(header.key)
    table, level_start = [], 0
    for view, level_lengths in zip(payload, lengths, strict=True):
        start = 0
        for length in level_lengths:
            end = start + padded_bytes(length)
            table.append(Segment(level_start + start, length, xxh3_64_intdigest(view[start:end], seed)))
            start = end
        level_start += start
    return Frame(_make_head(header, tuple(table), level_start), tuple(payload))


def head_bytes(prefix: Buffer) -> int:
    """Length of prefix, header and segment table, from the first `PREFIX_BYTES` bytes of a frame.

    Raises:
        FrameVersionError: The format version is unknown.
        FrameCorruptError: The magic is wrong or a length is out of range.
    """
    if len(prefix) < PREFIX_BYTES:
        raise FrameCorruptError(f"a frame has at least {PREFIX_BYTES} bytes, not {len(prefix)}")
    magic, version, _, header_bytes, segments, _, _, _ = _PREFIX.unpack_from(prefix)
    if magic != MAGIC:
        raise FrameCorruptError("wrong magic: these bytes are not a kvstore frame")
    if version != VERSION:
        raise FrameVersionError(f"frame format version {version}; this build knows {VERSION}")
    if header_bytes > HEADER_BYTES_MAX or not 0 < segments <= SEGMENTS_MAX:
        raise FrameCorruptError(f"header of {header_bytes} bytes with {segments} segments is out of range")
    total_bytes: int = PREFIX_BYTES + header_bytes + _SEGMENT.size * segments
    if total_bytes % HEAD_ALIGNMENT:
        raise FrameCorruptError(f"the payload does not start at a multiple of {HEAD_ALIGNMENT} bytes")
    return total_bytes


def parse_head(raw: bytes) -> Head:
    """Head of a frame from exactly its bytes.

    Raises:
        FrameVersionError: The format version is unknown.
        FrameCorruptError: Anything in it is not what it must be.
    """
    if head_bytes(raw) != len(raw):
        raise FrameCorruptError("header and segment table are cut")
    _, _, zero_a, header_bytes, count, zero_b, payload_bytes, checksum = _PREFIX.unpack_from(raw)
    if _head_checksum(raw) != checksum:
        raise FrameCorruptError("header and segment table do not match their checksum")
    if zero_a or zero_b or payload_bytes > PAYLOAD_BYTES_MAX:
        raise FrameCorruptError("reserved bytes of the prefix are not zero, or the payload is too long")
    header = load_header(raw[PREFIX_BYTES : PREFIX_BYTES + header_bytes])
    table = raw[PREFIX_BYTES + header_bytes :]
    segments = tuple(Segment(*row) for row in _SEGMENT.iter_unpack(table))
    if sum(header.segment_counts()) != count:
        raise FrameCorruptError("the segment table does not have the segments that the header names")
    _check_table(segments, payload_bytes)
    head = Head(raw, header, segments)
    if 0 in head.level_bytes[1:]:
        raise FrameCorruptError("a level above 0 is empty, so its end could not be told from the level before")
    return head


def parse_frame(data: Buffer) -> Frame:
    """Frame from its bytes, every level a view of them; checksums are not yet verified.

    Raises:
        FrameVersionError: The format version is unknown.
        FrameCorruptError: The head is damaged or the length is not the end of a level.
    """
    view = memoryview(data)
    head_end = head_bytes(view[:PREFIX_BYTES])
    head = parse_head(bytes(view[:head_end]))
    payload, start = [], head_end
    for size_bytes in head.level_bytes[: head.held_levels(len(view) - head_end)]:
        payload.append(view[start : start + size_bytes])
        start += size_bytes
    return Frame(head, tuple(payload))


def blob_frame(key: ChunkKey, buffer: memoryview, length: int) -> Frame:
    """Frame around a blob of `length` bytes in a buffer of `padded_bytes(length)`; the padding is cleared here."""
    buffer[length:] = bytes(len(buffer) - length)
    return frame_around(blob_header(key), [buffer], [[length]])


def blob_of(frame: Frame) -> memoryview | None:
    """The opaque blob that a frame wraps, or None where the frame is a typed one."""
    if frame.head.header.pipeline[0]["stage"] != "blob":
        return None
    return frame.payload[0][: frame.head.segments[0].length]


def _join_padded(parts: Sequence[Buffer]) -> memoryview:
    views = [memoryview(part).cast("B") for part in parts]
    level = allocate(sum(padded_bytes(len(view)) for view in views))
    start = 0
    for view in views:
        end = start + padded_bytes(len(view))
        level[start : start + len(view)] = view
        level[start + len(view) : end] = bytes(end - start - len(view))
        start = end
    return level


def _make_head(header: Header, segments: tuple[Segment, ...], payload_bytes: int) -> Head:
    if len(segments) > SEGMENTS_MAX:
        raise ValueError(f"{len(segments)} segments are more than a frame can name")
    text = dump_header(header)
    table = b"".join(_SEGMENT.pack(*segment) for segment in segments)
    text += b" " * (-(PREFIX_BYTES + len(text) + len(table)) % HEAD_ALIGNMENT)
    if len(text) > HEADER_BYTES_MAX:
        raise ValueError(f"a header of {len(text)} bytes is over the limit of {HEADER_BYTES_MAX}")
    raw = bytearray(_PREFIX.pack(MAGIC, VERSION, 0, len(text), len(segments), 0, payload_bytes, 0))
    raw += text + table
    struct.pack_into("<Q", raw, _CHECKSUM_OFFSET, _head_checksum(raw))
    return parse_head(bytes(raw))


def _head_checksum(raw: Buffer) -> int:
    """xxh3-64 of the prefix before the checksum and of all that follows it."""
    view = memoryview(raw)
    return xxh3_64_intdigest(b"".join((view[:_CHECKSUM_OFFSET], view[PREFIX_BYTES:])))


def _check_table(segments: Sequence[Segment], payload_bytes: int) -> None:
    end = 0
    for segment in segments:
        if segment.offset != end:
            raise FrameCorruptError("segments leave a gap or overlap")
        end = padded_bytes(segment.offset + segment.length)
    if end != payload_bytes:
        raise FrameCorruptError(f"segments end at {end}, the payload at {payload_bytes}")
