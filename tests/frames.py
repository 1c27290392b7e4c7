"""Frames for tests, made without torch: sound ones, and ones that an attacker would make."""

import json
import random
import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from xxhash import xxh3_64_intdigest

from kvstore.frame import Frame
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey, chunk_key

PREFIX = struct.Struct("<8sHHIIIQQ")
ROW = struct.Struct("<QQQ")
MAGIC = bytes.fromhex("894b56460d0a1a0a")


def random_keys(count: int, *, seed: int = 0, namespace: bytes | None = None) -> list[ChunkKey]:
    """Different keys of one namespace, the same ones for every equal seed."""
    rng = random.Random(seed)
    common = rng.randbytes(NAMESPACE_BYTES) if namespace is None else namespace
    return [chunk_key(common, rng.randbytes(DIGEST_BYTES)) for _ in range(count)]


def frame_bytes(frame: Frame) -> bytes:
    """The frame as one byte string."""
    return b"".join(frame.buffers())


def batch_bytes(*records: bytes, kind: int = 0) -> bytes:
    """A batch body of records of one kind: frames, or the reasons of misses."""
    return b"".join(struct.pack("<B7xQ", kind, len(record)) + record for record in records)


def level_ends(frame: Frame) -> list[int]:
    """Lengths at which the bytes of a frame may be cut."""
    return [len(frame.head.raw) + end for end in accumulate(frame.head.level_bytes)]


def header_fields(key: ChunkKey, **changed: Any) -> dict[str, Any]:
    """Fields of a sound header with one level of one segment, some of them changed."""
    fields = {
        "namespace": key[:NAMESPACE_BYTES].hex(),
        "digest": key[NAMESPACE_BYTES:].hex(),
        "tokens": 256,
        "first_position": 0,
        "groups": [1],
        "planes": [["k"]],
        "pipeline": [{"stage": "test"}],
        "artefacts": [],
        "distortion": {},
        "behind": None,
    }
    return fields | changed


def forge(
    fields: Mapping[str, Any] | str | bytes,
    rows: Sequence[tuple[int, int, int]] = ((0, 0, 0),),
    payload: bytes = b"",
    **prefix: int,
) -> bytes:
    """A frame as somebody makes it who knows the format and means harm: its head checksum is right.

    Args:
        fields: Fields of the header, or its text.
        rows: Offset, length and checksum of every segment.
        payload: Bytes behind the head.
        prefix: Values of the prefix that are not what they should be: `version`, `header_bytes`, `segments`,
            `payload_bytes`, `zero_a`, `zero_b`.
    """
    text = json.dumps(fields) if isinstance(fields, Mapping) else fields
    header = text.encode() if isinstance(text, str) else text
    header += b" " * (-(PREFIX.size + len(header) + ROW.size * len(rows)) % 64)
    body = header + b"".join(ROW.pack(*row) for row in rows)
    start = PREFIX.pack(
        MAGIC,
        prefix.get("version", 1),
        prefix.get("zero_a", 0),
        prefix.get("header_bytes", len(header)),
        prefix.get("segments", len(rows)),
        prefix.get("zero_b", 0),
        prefix.get("payload_bytes", len(payload)),
        0,
    )[:32]
    return start + struct.pack("<Q", xxh3_64_intdigest(start + body)) + body + payload


def forge_sound(key: ChunkKey, payload: bytes, **changed: Any) -> bytes:
    """A frame with one segment that is right in everything, for changes of its header."""
    assert len(payload) % 16 == 0
    return forge(header_fields(key, **changed), [(0, len(payload), checksum(key, payload))], payload)


def checksum(key: ChunkKey, padded: bytes) -> int:
    """Checksum of a segment that belongs to a key."""
    return xxh3_64_intdigest(padded, xxh3_64_intdigest(key))


def flipped(data: bytes, position: int, bit: int = 0) -> bytes:
    """The bytes with one bit turned over."""
    damaged = bytearray(data)
    damaged[position] ^= 1 << bit
    return bytes(damaged)
