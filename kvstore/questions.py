"""What a client asks with: bodies of requests, cut to what one request may bring."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from kvstore.frame import Frame
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey
from kvstore.wire import DIGESTS_TYPE

PUT_BYTES = 64 << 20
PUT_FRAMES = 1024
WAIT_MS_MAX = 3600 * 1000


class Views(NamedTuple):
    """The body of a request, as views."""

    views: list[memoryview]
    content_type: str


def by_namespace(keys: Sequence[ChunkKey], keys_max: int) -> Iterator[tuple[str, bytes]]:
    """Runs of keys of one namespace, in order: the namespace in hexadecimal, and the digests joined."""
    if len(keys) == 1:
        yield keys[0][:NAMESPACE_BYTES].hex(), keys[0][NAMESPACE_BYTES:]
        return
    for namespace, run in groupby(keys, key=lambda key: key[:NAMESPACE_BYTES]):
        digests = b"".join([key[NAMESPACE_BYTES:] for key in run])
        for start in range(0, len(digests), keys_max * DIGEST_BYTES):
            yield namespace.hex(), digests[start : start + keys_max * DIGEST_BYTES]


def bodies(items: Iterable[tuple[ChunkKey, Frame]]) -> Iterator[list[Frame]]:
    """Frames of a put, cut into request bodies."""
    frames: list[Frame] = []
    for key, frame in items:
        assert key == frame.key, "a client puts a frame under the key that its header names"
        full = sum(other.size_bytes for other in frames) + frame.size_bytes > PUT_BYTES or len(frames) == PUT_FRAMES
        if frames and full:
            yield frames
            frames = []
        frames.append(frame)
    if frames:
        yield frames


def wait_query(wait_s: float) -> dict[str, str]:
    """The parameter that says how long a request may wait."""
    return {"wait_ms": str(min(round(wait_s * 1000), WAIT_MS_MAX))} if wait_s else {}


def target_of(path: str, query: Mapping[str, str]) -> bytes:
    """What names a request on a link: the route without `/v1/`, with its query."""
    return (path.removeprefix("/v1/") + "?" + "&".join([f"{name}={value}" for name, value in query.items()])).encode()


def json_of(value: object) -> Views:
    """A body of JSON."""
    return Views([memoryview(json.dumps(value).encode())], "application/json")


def body_of(digests: bytes) -> Views:
    """The body that names chunks."""
    return Views([memoryview(digests)], DIGESTS_TYPE)
