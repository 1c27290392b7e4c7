"""Buffers for payloads, used again once nobody holds them.

Touching fresh memory costs more than filling it: the kernel clears every page, and a virtual machine that gives free
memory back to its host has to ask for it again, at milliseconds a huge page. So large buffers come from a pool. A
buffer returns to it by itself when the last view of it is gone, wherever that happens, so nobody has to release
anything and nothing that is still being read is ever written to.

What was in use at one time a moment ago will be again: a client that gets batch after batch, a store that evicts as it
is filled. So a pool keeps that much, and gives the memory back some seconds after the last use.
"""

import ctypes
import mmap
import threading
import time
import weakref
from collections import defaultdict, deque
from functools import cache

POOLED_BYTES_MIN = 256 << 10
"""Smaller buffers come from the ordinary heap."""
POOL_BYTES_MAX = 128 << 20
"""Bytes that a pool keeps for later, beside those in use, however long."""
PEAK_S = 60.0
"""So long a pool keeps as many bytes as were in use at one time; not much longer than twice that."""

_HUGE_BYTES = 2 << 20
_CLASSES_PER_DOUBLING = 8


class BufferPool:
    """Memory mappings by size class.

    Args:
        limit_bytes: Most bytes that are kept for later, beside what the peak of use lets it keep.
        peak_s: Seconds for which a peak counts.
    """

    def __init__(self, limit_bytes: int = POOL_BYTES_MAX, peak_s: float = PEAK_S) -> None:
        self.free_bytes = 0
        self.used_bytes = 0
        self._limit_bytes = limit_bytes
        self._peak_s = peak_s
        # Most bytes in use in this span of time, and in the one before.
        self._peaks = [0, 0]
        self._span_ends_s = 0.0
        self._timer: threading.Timer | None = None
        self._counting = threading.RLock()
        self._free: defaultdict[int, deque[mmap.mmap]] = defaultdict(deque)
        self._in_use: dict[int, weakref.ref[ctypes.Array[ctypes.c_char]]] = {}

    def allocate(self, size_bytes: int) -> memoryview:
        """A writable buffer; its bytes are undefined until they are written."""
        if size_bytes < POOLED_BYTES_MIN:
            return memoryview(bytearray(size_bytes))
        class_bytes = _class_bytes(size_bytes)
        mapping = self._take(class_bytes)
        self._count(class_bytes)
        if mapping is None:
            # Free buffers of other sizes make way, so that both together are never more than was in use.
            self._shrink(class_bytes)
            mapping = _map(class_bytes)
        # Every view keeps this array alive, so its end is the end of the last view.
        array = _array_type(class_bytes).from_buffer(mapping)
        number = id(array)

        def returned(_: object) -> None:
            del self._in_use[number]
            self._count(-class_bytes)
            self._give(class_bytes, mapping)

        self._in_use[number] = weakref.ref(array, returned)
        return memoryview(array).cast("B")[:size_bytes]

    def _take(self, class_bytes: int) -> mmap.mmap | None:
        try:
            mapping = self._free[class_bytes].pop()
        except IndexError:
            return None
        self.free_bytes -= class_bytes
        return mapping

    def _give(self, class_bytes: int, mapping: mmap.mmap) -> None:
        # May run in any thread, wherever a last view is dropped; a race makes the count of bytes a little wrong.
        self._free[class_bytes].append(mapping)
        self.free_bytes += class_bytes
        self._shrink(class_bytes)
        if self._timer is None:
            self._expire_later()

    def _shrink(self, class_bytes: int) -> None:
        """Free what is too much; what was asked for lately will be asked for, so buffers of other sizes go first."""
        limit_bytes = max(self._limit_bytes, max(self._peaks) - self.used_bytes)
        if self.free_bytes <= limit_bytes:
            return
        for other in sorted(self._free, key=lambda size_bytes: size_bytes == class_bytes):
            while self.free_bytes > limit_bytes and self._take(other) is not None:
                pass

    def _count(self, class_bytes: int) -> None:
        """So many bytes more are in use."""
        with self._counting:
            self.used_bytes += class_bytes
            now_s = time.monotonic()
            if now_s >= self._span_ends_s:
                self._peaks = [self._peaks[1], self.used_bytes]
                self._span_ends_s = now_s + self._peak_s
            self._peaks[1] = max(self._peaks[1], self.used_bytes)

    def _expire(self) -> None:
        """Free what only a peak that is over has kept."""
        self._timer = None
        self._count(0)
        self._shrink(0)
        self._expire_later()

    def _expire_later(self) -> None:
        if self.free_bytes > self._limit_bytes:
            self._timer = threading.Timer(self._peak_s, self._expire)
            self._timer.name = "kvstore-buffers"
            self._timer.daemon = True
            self._timer.start()


_POOL = BufferPool()


def allocate(size_bytes: int) -> memoryview:
    """A writable buffer for a payload; its bytes are undefined until they are written."""
    return _POOL.allocate(size_bytes)


@cache
def _array_type(class_bytes: int) -> type[ctypes.Array[ctypes.c_char]]:
    """An array type; to make one takes longer than to receive a small buffer, and there are few classes."""
    return ctypes.c_char * class_bytes


def _class_bytes(size_bytes: int) -> int:
    """The size rounded up so that a buffer wastes at most an eighth and sizes that are near share a class."""
    step = 1 << max(0, size_bytes.bit_length() - 1 - _CLASSES_PER_DOUBLING.bit_length() + 1)
    return -(-size_bytes // step) * step


def _map(size_bytes: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size_bytes >= _HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
