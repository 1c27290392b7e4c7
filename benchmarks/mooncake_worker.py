"""The two ends of Mooncake Store, run by the interpreter that has its library: `hold` memory, or `drive` clients."""

import ctypes
import itertools
import json
import mmap
import sys
from typing import Any

from benchmarks.peer_drive import BATCH, BATCH_CHUNKS, EXISTS, GET, PUT, Taken, Work, drive_threads, fresh_key, held_key

_HANDSHAKE = "P2PHANDSHAKE"


def main() -> None:
    role, address, master, size = sys.argv[1:]
    store = _store(address, master, segment_bytes=int(size) if role == "hold" else 0)
    print(json.dumps({"ready": True}), flush=True)
    if role == "hold":
        sys.stdin.read()
    else:
        driver = Driver(store)
        for line in sys.stdin:
            print(json.dumps(driver.answer(json.loads(line))), flush=True)
    store.close()


def _store(address: str, master: str, segment_bytes: int) -> Any:
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    buffer_bytes = 64 << 20
    code = store.setup(address, _HANDSHAKE, segment_bytes, buffer_bytes, "tcp", "", master)
    assert code == 0, f"setup failed with {code}"
    return store


class Driver:
    """Makes the calls that it is told to.

    Args:
        store: A client that owns no memory of the store.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._pattern = b""
        self._arena: Arena | None = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What became of a question."""
        what = question.pop("do")
        if what == "measure":
            return vars(self._measure(Work(**question)))
        (self._hold if what == "hold" else self._release)(question["value_bytes"])
        return {}

    def _hold(self, value_bytes: int) -> None:
        self._pattern = bytes(itertools.islice(itertools.cycle(range(251)), 1 << 16)) * (value_bytes >> 16)
        source = Buffer(self._arena_of(value_bytes), 0, value_bytes)
        source.view[:value_bytes] = self._pattern
        for number in range(BATCH_CHUNKS):
            code = self._store.put_from(held_key(value_bytes, number), source.address, value_bytes)
            assert code == 0, f"put failed with {code}"
        source.view[:value_bytes] = bytes(value_bytes)
        assert self._store.get_into(held_key(value_bytes, 1), source.address, value_bytes) == value_bytes
        assert source.view[:value_bytes] == self._pattern, "mooncake gave other bytes back"
        assert self._store.is_exist(held_key(value_bytes, 1)) == 1
        assert self._store.is_exist("nothing") == 0

    def _release(self, value_bytes: int) -> None:
        for number in range(BATCH_CHUNKS):
            self._store.remove(held_key(value_bytes, number), True)

    def _measure(self, work: Work) -> Taken:
        size_bytes = work.value_bytes
        chunks = BATCH_CHUNKS if work.operation == BATCH else 1
        arena = self._arena_of(work.clients * size_bytes * chunks)
        buffers = [Buffer(arena, client * size_bytes * chunks, size_bytes * chunks) for client in range(work.clients)]
        keys = [held_key(size_bytes, number) for number in range(BATCH_CHUNKS)]
        fresh = [fresh_key(work, number) for number in range(work.calls if work.operation == PUT else 0)]
        for buffer in buffers if fresh else ():
            buffer.view[:size_bytes] = self._pattern

        def put(buffer: Buffer, number: int) -> None:
            code = self._store.put_from(fresh[number], buffer.address, size_bytes)
            assert code == 0, f"put failed with {code}"

        def get(buffer: Buffer, number: int) -> None:
            code = self._store.get_into(keys[number % BATCH_CHUNKS], buffer.address, size_bytes)
            assert code == size_bytes, f"get failed with {code}"

        def batch(buffer: Buffer, _: int) -> None:
            places = [buffer.address + number * size_bytes for number in range(BATCH_CHUNKS)]
            codes = self._store.batch_get_into(keys, places, [size_bytes] * BATCH_CHUNKS)
            assert codes == [size_bytes] * BATCH_CHUNKS, f"batch failed with {codes}"

        def exists(_: Buffer, number: int) -> None:
            assert self._store.is_exist(keys[number % BATCH_CHUNKS]) == 1

        call = {PUT: put, GET: get, BATCH: batch, EXISTS: exists}[work.operation]
        taken = drive_threads(buffers, call, work.calls)
        for key in fresh:
            self._store.remove(key, True)
        return taken

    def _arena_of(self, size_bytes: int) -> "Arena":
        """Registered memory, at least so much."""
        if self._arena is None or self._arena.size_bytes < size_bytes:
            if self._arena is not None:
                self._arena.unregister()
            self._arena = Arena(self._store, size_bytes)
        return self._arena


class Arena:
    """Registered memory, touched once so that it is not fresh when values arrive."""

    def __init__(self, store: Any, size_bytes: int) -> None:
        self._store = store
        self.size_bytes = size_bytes
        self.view = memoryview(mmap.mmap(-1, size_bytes))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))
        for start in range(0, size_bytes, mmap.PAGESIZE):
            self.view[start] = 1
        assert store.register_buffer(self.address, size_bytes) == 0, "the memory cannot be registered"

    def unregister(self) -> None:
        """Give it up."""
        self._store.unregister_buffer(self.address)


class Buffer:
    """A client's part of an arena."""

    def __init__(self, arena: Arena, start: int, size_bytes: int) -> None:
        self.view = arena.view[start : start + size_bytes]
        self.address = arena.address + start


if __name__ == "__main__":
    main()
