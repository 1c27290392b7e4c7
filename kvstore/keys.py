"""Chunk keys: 16 bytes of namespace and 32 of a SHA-256 chain over token ids.

A key is opaque bytes. Equal keys mean equal layout, salt and token prefix; only full chunks have keys.
docs/keys.md gives the chain byte for byte, with golden vectors.
"""

import hashlib
import re
import struct
from collections.abc import Sequence
from typing import NewType

from kvstore.errors import KeyFormatError
from kvstore.layout import Layout

NAMESPACE_BYTES = 16
DIGEST_BYTES = 32
KEY_BYTES = NAMESPACE_BYTES + DIGEST_BYTES
TOKEN_ID_MAX = 2**32 - 1

ChunkKey = NewType("ChunkKey", bytes)
"""48 bytes: namespace, then digest."""

_CHAIN_TAG = b"kvstore chain 1\n"
_HEX = {length: re.compile(f"[0-9a-f]{{{2 * length}}}") for length in (NAMESPACE_BYTES, DIGEST_BYTES)}


def namespace_of(layout: Layout) -> bytes:
    """Namespace of a layout: the first 16 bytes of its digest."""
    return layout.digest[:NAMESPACE_BYTES]


def chunk_keys(layout: Layout, token_ids: Sequence[int], *, salt: bytes = b"") -> list[ChunkKey]:
    """Keys of the full chunks of a prompt.

    Args:
        layout: Identity of the cache; its `chunk_tokens` cuts the prompt.
        token_ids: The prompt from its first token on; a last chunk that is not full has no key.
        salt: Whatever else the cache depends on, such as a tenant's cache salt; at most 65,535 bytes.

    Returns:
        One key for each full chunk, in order; each stands for all tokens up to the end of its chunk.

    Raises:
        ValueError: A token id is not a 32-bit unsigned integer, or the salt is too long.
    """
    if len(salt) > 0xFFFF:
        raise ValueError(f"a salt has at most 65535 bytes, not {len(salt)}")
    namespace = namespace_of(layout)
    digest = hashlib.sha256(_CHAIN_TAG + layout.digest + struct.pack("<I", len(salt)) + salt).digest()
    keys = []
    for start in range(0, len(token_ids) - layout.chunk_tokens + 1, layout.chunk_tokens):
        digest = hashlib.sha256(digest + _pack_ids(token_ids[start : start + layout.chunk_tokens])).digest()
        keys.append(ChunkKey(namespace + digest))
    return keys


def chunk_key(namespace: bytes, digest: bytes) -> ChunkKey:
    """Key from its two parts.

    Raises:
        KeyFormatError: A part has not its fixed length.
    """
    if len(namespace) != NAMESPACE_BYTES or len(digest) != DIGEST_BYTES:
        raise KeyFormatError(
            f"a key has {NAMESPACE_BYTES} + {DIGEST_BYTES} bytes, not {len(namespace)} + {len(digest)}"
        )
    return ChunkKey(bytes(namespace) + bytes(digest))


def parse_hex(text: str, length: int, what: str) -> bytes:
    """Bytes of a fixed-length lower-case hexadecimal text.

    Raises:
        KeyFormatError: The text has another length or other characters.
    """
    if not _HEX[length].fullmatch(text):
        raise KeyFormatError(f"{what} must be {2 * length} lower-case hexadecimal digits")
    return bytes.fromhex(text)


def split_key(key: ChunkKey) -> tuple[bytes, bytes]:
    """Namespace and digest of a key."""
    return key[:NAMESPACE_BYTES], key[NAMESPACE_BYTES:]


def _pack_ids(token_ids: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    except struct.error as exc:
        raise ValueError(f"token ids must be integers from 0 to {TOKEN_ID_MAX}") from exc
