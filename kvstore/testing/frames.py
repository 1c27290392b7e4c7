"""Frames with random payloads, made without torch and from seeds alone."""

import random
from collections.abc import Sequence

from kvstore.frame import Frame, pack_frame
from kvstore.header import Behind, Header
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey, chunk_key

NAMESPACE = bytes(range(NAMESPACE_BYTES))


def make_key(number: int, namespace: bytes = NAMESPACE) -> ChunkKey:
    """A key that is the same for the same number."""
    return chunk_key(namespace, random.Random(number).randbytes(DIGEST_BYTES))  # noqa: S311 (no secret)


def make_frame(
    key: ChunkKey,
    level_bytes: Sequence[int] = (400, 300, 200),
    *,
    seed: int = 0,
    groups: Sequence[int] = (1,),
    first_position: int = 0,
    behind: Behind | None = None,
) -> Frame:
    """A frame with one plane a level.

    Args:
        key: Key that its header names.
        level_bytes: Length of each level's segment in every layer group.
        seed: Frames of different seeds differ in their payload, and so in their id.
        groups: Layers in each layer group.
        first_position: Where it stands in its prompt; it has 256 tokens.
        behind: Marks the frame as inexact.
    """
    rng = random.Random(f"{key.hex()} {seed}")  # noqa: S311 (no secret)
    header = Header(
        key=key,
        tokens=256,
        first_position=first_position,
        groups=tuple(groups),
        planes=tuple((f"k.{level}",) for level in range(len(level_bytes))),
        pipeline=({"stage": "test"},),
        behind=behind,
    )
    return pack_frame(header, [rng.randbytes(size) for size in level_bytes for _ in groups])
