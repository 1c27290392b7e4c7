"""Ways to put and get one value, all behind the same few methods, so that one loop times them alike.

A peer has numbered slots; slot `i` has a key and a value of its own. Everything that a user would have at hand before
a put (a frame, a byte string, a view) is made by `open`, outside of the timing.
"""

import hashlib
import mmap
from collections.abc import Sequence
from typing import Protocol

from benchmarks.bare import BareHttp
from kvstore.backend import Outcome
from kvstore.client import Client
from kvstore.frame import Frame, blob_of, pack_frame
from kvstore.header import blob_header
from kvstore.keys import ChunkKey, chunk_key, split_key
from kvstore.wire import FRAME_TYPE

NAMESPACE = hashlib.sha256(b"kvstore benchmark").digest()[:16]


class Peer(Protocol):
    """A way to put and get values; only `put` and `get` are timed."""

    name: str

    async def open(self, values: Sequence[bytes]) -> None:
        """Connect, and make ready what puts need."""
        ...

    async def put(self, slot: int) -> None:
        """Store the value of a slot; done when the other side has answered that it is held."""
        ...

    async def get(self, slot: int) -> memoryview:
        """Read the value of a slot."""
        ...

    async def delete(self, slot: int) -> None:
        """Forget the value of a slot."""
        ...

    async def aclose(self) -> None:
        """Disconnect."""
        ...


class ClientPeer:
    """A kvstore server through `kvstore.client.Client`: frames out, verified frames back."""

    name = "kvstore client"

    def __init__(self, url: str) -> None:
        self._client = Client(url)
        self._frames: list[Frame] = []

    async def open(self, values: Sequence[bytes]) -> None:
        self._frames = [_frame(self.name, slot, value) for slot, value in enumerate(values)]

    async def put(self, slot: int) -> None:
        frame = self._frames[slot]
        [stored] = await self._client.put([(frame.key, frame)])
        assert stored.outcome is Outcome.WRITTEN, stored

    async def get(self, slot: int) -> memoryview:
        [found] = await self._client.get([self._frames[slot].key])
        blob = blob_of(found) if isinstance(found, Frame) else None
        assert blob is not None, found
        return blob

    async def delete(self, slot: int) -> None:
        await self._client.delete([self._frames[slot].key])

    async def aclose(self) -> None:
        await self._client.aclose()


class BareSocketPeer:
    """The same kvstore server through one blocking socket: frames out, the blobs back into one reused buffer.

    Nothing is verified and nothing is kept on this side, so a client that does both cannot be faster.
    """

    name = "bare socket"

    def __init__(self, url: str) -> None:
        self._url = url
        self._http: BareHttp | None = None
        self._frames: list[Frame] = []

    async def open(self, values: Sequence[bytes]) -> None:
        self._frames = [_frame(self.name, slot, value) for slot, value in enumerate(values)]
        self._http = BareHttp(self._url, max(len(value) for value in values))

    async def put(self, slot: int) -> None:
        frame = self._frames[slot]
        answer = self._connection.request("PUT", _target(frame.key), FRAME_TYPE, list(frame.buffers()))
        assert answer.status == 201, bytes(answer.body)

    async def get(self, slot: int) -> memoryview:
        answer = self._connection.request("GET", _target(self._frames[slot].key))
        assert answer.status == 200, bytes(answer.body)
        return answer.body

    async def delete(self, slot: int) -> None:
        assert self._connection.request("DELETE", _target(self._frames[slot].key)).status == 204

    async def aclose(self) -> None:
        if self._http is not None:
            self._http.close()

    @property
    def _connection(self) -> BareHttp:
        assert self._http is not None, "open comes first"
        return self._http


class RedisPeer:
    """A Redis server over TCP through redis-py's asynchronous client."""

    name = "redis-py asyncio"

    def __init__(self, port: int) -> None:
        from redis.asyncio import Redis

        self._redis = Redis(port=port)
        self._values: Sequence[bytes] = ()

    async def open(self, values: Sequence[bytes]) -> None:
        self._values = values

    async def put(self, slot: int) -> None:
        assert await self._redis.set(self._key(slot), self._values[slot])

    async def get(self, slot: int) -> memoryview:
        return memoryview(await self._redis.get(self._key(slot)))

    async def delete(self, slot: int) -> None:
        await self._redis.delete(self._key(slot))

    async def aclose(self) -> None:
        await self._redis.aclose()

    def _key(self, slot: int) -> str:
        return _redis_key(self.name, len(self._values[slot]), slot)


class SyncRedisPeer:
    """The same Redis server through redis-py's blocking client."""

    name = "redis-py"

    def __init__(self, port: int) -> None:
        from redis import Redis

        self._redis = Redis(port=port)
        self._values: Sequence[bytes] = ()

    async def open(self, values: Sequence[bytes]) -> None:
        self._values = values

    async def put(self, slot: int) -> None:
        assert self._redis.set(self._key(slot), self._values[slot])

    async def get(self, slot: int) -> memoryview:
        return memoryview(self._redis.get(self._key(slot)))

    async def delete(self, slot: int) -> None:
        self._redis.delete(self._key(slot))

    async def aclose(self) -> None:
        self._redis.close()

    def _key(self, slot: int) -> str:
        return _redis_key(self.name, len(self._values[slot]), slot)


class MemcpyPeer:
    """A copy within this process, by one thread: what no transfer can beat.

    Args:
        name: What the copy goes into.
        fresh: Whether each copy goes into memory fresh from the kernel, and not into one warm buffer.
    """

    def __init__(self, name: str, *, fresh: bool) -> None:
        self.name = name
        self._fresh = fresh
        self._values: Sequence[bytes] = ()
        self._copies: dict[int, memoryview] = {}
        self._warm = memoryview(b"")

    async def open(self, values: Sequence[bytes]) -> None:
        self._values = values
        self._warm = memoryview(bytearray(max(len(value) for value in values)))

    async def put(self, slot: int) -> None:
        value = self._values[slot]
        copy = self._buffer(len(value))
        copy[:] = value
        self._copies[slot] = copy

    async def get(self, slot: int) -> memoryview:
        return self._copies[slot]

    async def delete(self, slot: int) -> None:
        self._copies.pop(slot, None)

    async def aclose(self) -> None:
        self._copies.clear()

    def _buffer(self, size_bytes: int) -> memoryview:
        if not self._fresh:
            return self._warm[:size_bytes]
        return memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


MEMCPY_WARM = "memcpy, warm"
MEMCPY_FRESH = "memcpy, fresh"


def memcpy_peers() -> list[MemcpyPeer]:
    """The copies that every machine's figures are to be seen against."""
    return [MemcpyPeer(MEMCPY_WARM, fresh=False), MemcpyPeer(MEMCPY_FRESH, fresh=True)]


def benchmark_key(name: str, number: int) -> ChunkKey:
    """A key of the benchmark's namespace."""
    return chunk_key(NAMESPACE, hashlib.sha256(f"{name} {number}".encode()).digest())


def _frame(name: str, slot: int, value: bytes) -> Frame:
    return pack_frame(blob_header(benchmark_key(f"{name} {len(value)}", slot)), [value])


def _target(key: ChunkKey) -> str:
    namespace, digest = split_key(key)
    return f"/v1/kv/{namespace.hex()}/{digest.hex()}"


def _redis_key(name: str, value_bytes: int, slot: int) -> str:
    return f"{name} {value_bytes} {slot}"
