"""Parameters of requests: parsed, bounded, or refused with their name."""

from aiohttp import web

from kvstore.backend import Ack
from kvstore.errors import RequestError
from kvstore.header import LEVELS_MAX
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey, chunk_key, parse_hex


def url_key(request: web.Request) -> ChunkKey:
    """Key that the path names.

    Raises:
        KeyFormatError: Namespace or digest is malformed.
    """
    return chunk_key(
        parse_hex(request.match_info["namespace"], NAMESPACE_BYTES, "namespace"),
        parse_hex(request.match_info["digest"], DIGEST_BYTES, "digest"),
    )


def namespace_of(request: web.Request) -> bytes:
    """Namespace that `?namespace=` names.

    Raises:
        KeyFormatError: It is missing or malformed.
    """
    return parse_hex(request.query.get("namespace", ""), NAMESPACE_BYTES, "namespace")


def level_of(request: web.Request) -> int | None:
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


def ack_of(request: web.Request) -> Ack:
    """Durability that `?ack=` asks for, `memory` by default.

    Raises:
        RequestError: It is unknown.
    """
    text = request.query.get("ack", "memory")
    try:
        return Ack[text.upper()]
    except KeyError:
        raise RequestError(f"ack must be one of {', '.join(ack.name.lower() for ack in Ack)}") from None
