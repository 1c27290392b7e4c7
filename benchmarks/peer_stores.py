"""The stores that benchmarks.peers compares, each through the fastest client that it has here.

Asynchronous clients share one event loop, blocking ones have a thread each; both live in one process with one
connection a client. Mooncake's library is installed in an environment of its own, so its threads run there.
"""

import asyncio
import hashlib
import json
import socket
import struct
import subprocess
from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.peer_drive import (
    BATCH,
    BATCH_CHUNKS,
    EXISTS,
    GET,
    PUT,
    Taken,
    Work,
    drive,
    drive_threads,
    fresh_key,
    held_key,
)
from kvstore.backend import Outcome
from kvstore.client import Client
from kvstore.frame import Frame, frame_around
from kvstore.header import blob_header
from kvstore.keys import ChunkKey, chunk_key

_NAMESPACE = hashlib.sha256(b"kvstore peers").digest()[:16]


class Store(Protocol):
    """A store under test.

    Args:
        name: Its name in the tables.
        pids: Processes of its server.
    """

    name: str
    pids: Sequence[int]

    async def open(self, clients: int) -> None:
        """Connect that many clients."""
        ...

    async def hold(self, value: bytes) -> None:
        """Put values under the held keys and check that they come back as they were."""
        ...

    async def release(self, value_bytes: int) -> None:
        """Forget the values of that size."""
        ...

    async def measure(self, work: Work) -> Taken:
        """Make the calls; what has to be done before and after them is not timed."""
        ...

    async def aclose(self) -> None:
        """Disconnect."""
        ...


class KvstoreStore:
    """A kvstore server through `Client`: frames out, verified frames back."""

    name = "kvstore"

    def __init__(self, url: str, pids: Sequence[int]) -> None:
        self.pids = pids
        self._url = url
        self._clients: list[Client] = []
        self._value = b""
        self._frames: list[Frame] = []

    async def open(self, clients: int) -> None:
        self._clients = [Client(self._url, connections=1, timeout_s=120.0) for _ in range(clients)]

    async def hold(self, value: bytes) -> None:
        self._value = value
        for number in range(BATCH_CHUNKS):
            await self._put(self._clients[0], self._frame(held_key(len(value), number)))
        for client in self._clients:
            [found] = await client.get([_chunk_key(held_key(len(value), 0))])
            assert isinstance(found, Frame), found
            assert found.payload[0] == value, "kvstore gave other bytes back"
            assert await self._exists(client, held_key(len(value), 1))
        assert not await self._exists(self._clients[0], "nothing")

    async def release(self, value_bytes: int) -> None:
        keys = [_chunk_key(held_key(value_bytes, number)) for number in range(BATCH_CHUNKS)]
        await self._clients[0].delete(keys)

    async def measure(self, work: Work) -> Taken:
        frames = [self._frame(fresh_key(work, number)) for number in range(work.calls if work.operation == PUT else 0)]
        keys = [_chunk_key(held_key(work.value_bytes, number)) for number in range(BATCH_CHUNKS)]

        async def put(client: Client, number: int) -> None:
            await self._put(client, frames[number])

        async def get(client: Client, number: int) -> list[Any]:
            found = await client.get([keys[number % BATCH_CHUNKS]])
            assert isinstance(found[0], Frame), found
            return found

        async def batch(client: Client, _: int) -> list[Any]:
            found = await client.get(keys)
            assert all(isinstance(frame, Frame) for frame in found), found
            return found

        async def exists(client: Client, number: int) -> None:
            assert len((await client.match([keys[number % BATCH_CHUNKS]])).held) == 1

        call = {PUT: put, GET: get, BATCH: batch, EXISTS: exists}[work.operation]
        taken = await drive(self._clients[: work.clients], call, work.calls)
        await self._clients[0].delete([frame.key for frame in frames])
        return taken

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()

    async def _exists(self, client: Client, name: str) -> bool:
        return bool((await client.match([_chunk_key(name)])).held)

    async def _put(self, client: Client, frame: Frame) -> None:
        [stored] = await client.put([(frame.key, frame)])
        assert stored.outcome is Outcome.WRITTEN, stored

    def _frame(self, name: str) -> Frame:
        """A frame around the one value; its checksums are its own."""
        return frame_around(blob_header(_chunk_key(name)), [memoryview(self._value)], [[len(self._value)]])


class RedisStore:
    """A Redis server over TCP through redis-py's asynchronous client."""

    name = "redis, asyncio"

    def __init__(self, port: int, pids: Sequence[int]) -> None:
        self.pids = pids
        self._port = port
        self._clients: list[Any] = []
        self._value = b""

    async def open(self, clients: int) -> None:
        from redis.asyncio import Redis

        self._clients = [Redis(port=self._port, single_connection_client=True) for _ in range(clients)]

    async def hold(self, value: bytes) -> None:
        self._value = value
        for number in range(BATCH_CHUNKS):
            await self._clients[0].set(held_key(len(value), number), value)
        for client in self._clients:
            assert await client.get(held_key(len(value), 0)) == value, "redis gave other bytes back"
            assert await client.exists(held_key(len(value), 1))

    async def release(self, value_bytes: int) -> None:
        await self._clients[0].delete(*(held_key(value_bytes, number) for number in range(BATCH_CHUNKS)))

    async def measure(self, work: Work) -> Taken:
        keys = [held_key(work.value_bytes, number) for number in range(BATCH_CHUNKS)]
        fresh = [fresh_key(work, number) for number in range(work.calls if work.operation == PUT else 0)]

        async def put(client: Any, number: int) -> None:
            assert await client.set(fresh[number], self._value)

        async def get(client: Any, number: int) -> object:
            found = await client.get(keys[number % BATCH_CHUNKS])
            assert found is not None
            return found

        async def batch(client: Any, _: int) -> object:
            found = await client.mget(keys)
            assert None not in found
            return found

        async def exists(client: Any, number: int) -> None:
            assert await client.exists(keys[number % BATCH_CHUNKS]) == 1

        call = {PUT: put, GET: get, BATCH: batch, EXISTS: exists}[work.operation]
        taken = await drive(self._clients[: work.clients], call, work.calls)
        for key in fresh:
            await self._clients[0].delete(key)
        return taken

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()


class BlockingStore:
    """What stores with blocking clients have in common: a client is an object with `put get batch exists delete`.

    It gets ready for the timing in `prepare`, and gives back in `finish` what that took.
    """

    name = ""

    def __init__(self, port: int, pids: Sequence[int]) -> None:
        self.pids = pids
        self._port = port
        self._clients: list[Any] = []
        self._value = b""

    async def open(self, clients: int) -> None:
        self._clients = [self._connect(clients) for _ in range(clients)]

    async def hold(self, value: bytes) -> None:
        self._value = value
        for number in range(BATCH_CHUNKS):
            self._clients[0].put(held_key(len(value), number), value)
        for client in self._clients:
            assert client.get(held_key(len(value), 0)) == value, f"{self.name} gave other bytes back"
            assert client.exists(held_key(len(value), 1))
        assert not self._clients[0].exists("nothing")

    async def release(self, value_bytes: int) -> None:
        for number in range(BATCH_CHUNKS):
            self._clients[0].delete(held_key(value_bytes, number))

    async def measure(self, work: Work) -> Taken:
        keys = [held_key(work.value_bytes, number) for number in range(BATCH_CHUNKS)]
        fresh = [fresh_key(work, number) for number in range(work.calls if work.operation == PUT else 0)]

        def put(client: Any, number: int) -> None:
            client.put(fresh[number], self._value)

        def get(client: Any, number: int) -> object:
            return client.get(keys[number % BATCH_CHUNKS])

        def batch(client: Any, _: int) -> object:
            return client.batch(keys)

        def exists(client: Any, number: int) -> None:
            assert client.exists(keys[number % BATCH_CHUNKS])

        call = {PUT: put, GET: get, BATCH: batch, EXISTS: exists}[work.operation]
        for client in self._clients[: work.clients]:
            client.prepare(work)
        taken = await asyncio.to_thread(drive_threads, self._clients[: work.clients], call, work.calls)
        for client in self._clients[: work.clients]:
            client.finish()
        for key in fresh:
            self._clients[0].delete(key)
        return taken

    async def aclose(self) -> None:
        for client in self._clients:
            client.close()

    def _connect(self, clients: int) -> object:
        raise NotImplementedError


class BlockingRedisStore(BlockingStore):
    """The same Redis server through redis-py's blocking client."""

    name = "redis, threads"

    def _connect(self, clients: int) -> object:
        return _BlockingRedis(self._port)


class _BlockingRedis:
    def __init__(self, port: int) -> None:
        from redis import Redis

        self._redis = Redis(port=port, single_connection_client=True)

    def put(self, key: str, value: bytes) -> None:
        assert self._redis.set(key, value)

    def get(self, key: str) -> object:
        found = self._redis.get(key)
        assert found is not None
        return found

    def prepare(self, work: Work) -> None:
        pass

    def finish(self) -> None:
        pass

    def batch(self, keys: Sequence[str]) -> object:
        found = self._redis.mget(keys)
        assert None not in found
        return found

    def exists(self, key: str) -> bool:
        return bool(self._redis.exists(key) == 1)

    def delete(self, key: str) -> None:
        self._redis.delete(key)

    def close(self) -> None:
        self._redis.close()


class LmcacheStore(BlockingStore):
    """LMCache's `lm://` server, driven over its own messages.

    The messages are written here, so that its client's tensors cost nothing: values go out of and into buffers that are
    used again. A put has no answer, so it is followed by an `exists`. The server cannot delete.
    """

    name = "lmcache"

    def _connect(self, clients: int) -> object:
        return _LmcacheClient(self._port)


class _LmcacheClient:
    _REQUEST = struct.Struct("iiiiiiiii150s")
    _ANSWER = struct.Struct("iiiiiiiii")
    _PUT, _GET, _EXIST = 1, 2, 3
    _SUCCESS, _BINARY, _UINT8 = 200, 4, 6

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffers: list[memoryview] = []

    def put(self, key: str, value: bytes) -> None:
        # Fresh keys go round, because what is put there stays.
        self._socket.sendall(self._message(self._PUT, key, len(value)))
        self._socket.sendall(value)
        assert self.exists(key)

    def prepare(self, work: Work) -> None:
        # Filled with zeros here, so that they are not fresh memory when values arrive.
        chunks = {GET: 1, BATCH: BATCH_CHUNKS}.get(work.operation, 0)
        self._buffers = [memoryview(bytearray(work.value_bytes)) for _ in range(chunks)]
        for buffer in self._buffers:
            buffer[:] = bytes([1]) * len(buffer)

    def finish(self) -> None:
        self._buffers = []

    def get(self, key: str) -> memoryview:
        return self.batch([key])[0]

    def batch(self, keys: Sequence[str]) -> list[memoryview]:
        self._socket.sendall(b"".join([self._message(self._GET, key) for key in keys]))
        return [self._value(number) for number in range(len(keys))]

    def exists(self, key: str) -> bool:
        self._socket.sendall(self._message(self._EXIST, key))
        return self._answer()[0] == self._SUCCESS

    def delete(self, key: str) -> None:
        pass

    def close(self) -> None:
        self._socket.close()

    def _message(self, command: int, key: str, length: int = 0) -> bytes:
        digest = int.from_bytes(hashlib.sha256(_recycled(key).encode()).digest()[:6], "big")
        name = f"blob@1@0@{digest:x}@uint8".encode().ljust(150)
        return self._REQUEST.pack(command, length, self._BINARY, self._UINT8, 0, length, 0, 0, 0, name)

    def _value(self, number: int) -> memoryview:
        code, length = self._answer()
        assert code == self._SUCCESS, code
        while len(self._buffers) <= number:
            self._buffers.append(memoryview(b""))
        if len(self._buffers[number]) != length:
            self._buffers[number] = memoryview(bytearray(length))
        self._fill(self._buffers[number])
        return self._buffers[number]

    def _answer(self) -> tuple[int, int]:
        head = memoryview(bytearray(self._ANSWER.size))
        self._fill(head)
        code, length, *_ = self._ANSWER.unpack(head)
        return code, length

    def _fill(self, buffer: memoryview) -> None:
        got = 0
        while got < len(buffer):
            received = self._socket.recv_into(buffer[got:])
            assert received, "the server closed the connection"
            got += received


class MooncakeStore:
    """Mooncake Store over TCP: a process that holds the memory, and threads of another that share one client.

    The second process owns no memory of the store, or it would copy within itself. Values go out of and into
    registered buffers, which costs no copy on its side.
    """

    name = "mooncake"

    def __init__(self, worker: "subprocess.Popen[str]", pids: Sequence[int]) -> None:
        self.pids = pids
        self._worker = worker
        self._value_bytes = 0

    async def open(self, clients: int) -> None:
        pass

    async def hold(self, value: bytes) -> None:
        await self._ask({"do": "hold", "value_bytes": len(value)})

    async def release(self, value_bytes: int) -> None:
        await self._ask({"do": "release", "value_bytes": value_bytes})

    async def measure(self, work: Work) -> Taken:
        return Taken(**await self._ask({"do": "measure", **work._asdict()}))

    async def aclose(self) -> None:
        pass

    async def _ask(self, question: dict[str, object]) -> dict[str, Any]:
        return await asyncio.to_thread(ask_worker, self._worker, question)


def ask_worker(worker: "subprocess.Popen[str]", question: dict[str, object]) -> dict[str, Any]:
    """Put a question to a worker process, one JSON line each way."""
    assert worker.stdin is not None, "the worker is piped"
    assert worker.stdout is not None, "the worker is piped"
    worker.stdin.write(json.dumps(question) + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        # Its library writes there too.
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise RuntimeError("the worker has gone")


def _chunk_key(name: str) -> ChunkKey:
    return chunk_key(_NAMESPACE, hashlib.sha256(name.encode()).digest())


def _recycled(key: str) -> str:
    """One of 16 keys for every fresh one."""
    kind, size, number = key.split(" ") if key.startswith("fresh") else (key, "", "0")
    return f"{kind} {size} {int(number) % 16}"
