"""How a chunk lies in the disk tier's databases: keys and records, and the pages that they take.

    index   key                          -> what is held (`pack_record`)
    heads   key                          -> prefix, header and segment table of the frame
    levels  key, level                   -> first part of the level's payload
            key, level, part (3 bytes)   -> every further part, numbered from 1

A level is cut into parts of `PART_BYTES`. A value of LMDB lies in one run of pages, and in a file that small chunks
once filled there are no long runs, however much of it is free; nearly any free room fits a part. A reader takes parts
of any length until the level is complete, which is how one that lies in a single record is read.
"""

import struct
from collections.abc import Callable, Iterator, Sequence

from kvstore.backend import Copy, Held
from kvstore.backends.index import shared_copy
from kvstore.backends.policies import Origin
from kvstore.buffers import allocate
from kvstore.frame import HEAD_BYTES_MAX, PAYLOAD_BYTES_MAX
from kvstore.header import LEVELS_MAX, PROFILE_ID_BYTES
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey, split_key

PAGE_BYTES = 4096
PAGE_HEADER_BYTES = 16
PART_BYTES = (64 << 10) - PAGE_HEADER_BYTES
"""Payload bytes of a part: with the header of its first page it fills whole pages."""

_RECORD = struct.Struct(f"<16sBB??IIQ32s{PROFILE_ID_BYTES}s")
_RECORD_1 = struct.Struct("<16sBBBxI")
_RECORD_2 = struct.Struct("<16sBBBxIIQ32s")
"""Of the formats before, which said less."""
_NO_PARENT = bytes(DIGEST_BYTES)
_LEVEL_SIZE = struct.Struct("<Q")


def level_suffix(level: int, part: int = 0) -> bytes:
    """What follows a chunk's key in the key of a part; the parts of a level follow one another."""
    return bytes([level]) + (part.to_bytes(3, "big") if part else b"")


def find_level(find: Callable[[bytes], memoryview | None], level: int, size_bytes: int) -> list[memoryview] | None:
    """The parts of a level of so many bytes; None where they are not there, or not of that length together.

    Args:
        find: Finds a part by what follows the chunk's key.
        level: Number of the level.
        size_bytes: Bytes that its parts have together.
    """
    found: list[memoryview] = []
    while size_bytes > 0 or not found:
        part = find(level_suffix(level, len(found)))
        if part is None or (found and not part):
            return None
        found.append(part)
        size_bytes -= len(part)
    return None if size_bytes else found


def joined(found: Sequence[memoryview]) -> memoryview:
    """A copy of a level's parts in one buffer."""
    level = allocate(sum(len(part) for part in found))
    start = 0
    for part in found:
        level[start : start + len(part)] = part
        start += len(part)
    return level


def parts(view: memoryview) -> Iterator[memoryview]:
    """A level's payload in parts; an empty level has an empty one."""
    for start in range(0, max(1, len(view)), PART_BYTES):
        yield view[start : start + PART_BYTES]


def size_on_disk_bytes(copy: Copy) -> int:
    """Whole pages that a chunk takes in the environment, an estimate for its small records included."""
    whole_parts = sum(size // PART_BYTES for size in copy.level_bytes)
    rests = (size % PART_BYTES for size in copy.level_bytes)
    pages_bytes = sum(_pages_bytes(size) for size in (copy.head_bytes, *rests))
    return pages_bytes + whole_parts * (PART_BYTES + PAGE_HEADER_BYTES) + PAGE_BYTES


def pack_record(held: Held, origin: Origin) -> bytes:
    """Index record of a chunk."""
    assert held.frame_id is not None, "a backend knows the ids of its own frames"
    copy = held.copy
    parent = _NO_PARENT if origin.parent is None else split_key(origin.parent)[1]
    sizes = b"".join(_LEVEL_SIZE.pack(size) for size in copy.level_bytes)
    return (
        _RECORD.pack(
            held.frame_id,
            len(copy.level_bytes),
            copy.levels,
            copy.inexact,
            copy.lossless,
            copy.head_bytes,
            origin.tokens,
            origin.first_position,
            parent,
            copy.profile,
        )
        + sizes
    )


def unpack_record(tier: str, key: ChunkKey, record: memoryview) -> tuple[Held, Origin] | None:
    """What an index record says; None where it is none."""
    if not _is(_RECORD, record):
        return None
    frame_id, held_levels, levels, inexact, lossless, head_bytes, *place, profile = _RECORD.unpack_from(record)
    if not 0 < held_levels <= levels:
        return None
    level_bytes = tuple(size for (size,) in _LEVEL_SIZE.iter_unpack(record[_RECORD.size :]))
    if levels > LEVELS_MAX or head_bytes > HEAD_BYTES_MAX or sum(level_bytes) > PAYLOAD_BYTES_MAX:
        return None
    held = Held(frame_id, shared_copy(tier, head_bytes, level_bytes, levels, inexact, lossless, profile))
    return held, _origin(key, *place)


def is_old_record(record: memoryview) -> bool:
    """Whether this is a record of format 1 or 2."""
    return _is(_RECORD_1, record) or _is(_RECORD_2, record)


def old_origin(key: ChunkKey, record: memoryview) -> Origin | None:
    """Where a chunk stands in its prompt, as a record of format 2 says; format 1 did not."""
    return _origin(key, *_RECORD_2.unpack_from(record)[5:]) if _is(_RECORD_2, record) else None


def _is(kind: struct.Struct, record: memoryview) -> bool:
    """Whether a record is as long as this kind is with so many levels as it says."""
    return len(record) >= kind.size and len(record) == kind.size + record[16] * _LEVEL_SIZE.size


def _origin(key: ChunkKey, tokens: int, first_position: int, parent: bytes) -> Origin:
    # A prompt's chunks lie in one namespace.
    return Origin(tokens, first_position, None if parent == _NO_PARENT else ChunkKey(key[:NAMESPACE_BYTES] + parent))


def _pages_bytes(size_bytes: int) -> int:
    return -(-(size_bytes + PAGE_HEADER_BYTES) // PAGE_BYTES) * PAGE_BYTES
