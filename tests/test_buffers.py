"""Buffers: used again only when the last view is gone, and no more kept than was in use a moment ago."""

import gc
import time

import pytest

from kvstore.buffers import POOLED_BYTES_MIN, BufferPool, _class_bytes

LARGE = 3 << 20


def test_a_buffer_is_used_again_once_nobody_holds_it() -> None:
    pool = BufferPool()
    first = pool.allocate(LARGE)
    first[:] = b"\1" * LARGE
    part = first[100:200]
    del first
    gc.collect()
    assert pool.free_bytes == 0, "a part of it is still held"
    assert bytes(part) == b"\1" * 100
    del part
    gc.collect()
    assert pool.free_bytes == _class_bytes(LARGE)
    again = pool.allocate(LARGE - 1000)
    assert pool.free_bytes == 0
    assert bytes(again[:4]) == b"\1" * 4, "it is the same memory"


def test_buffers_in_use_never_share_memory() -> None:
    pool = BufferPool()
    views = [pool.allocate(LARGE) for _ in range(4)]
    for number, view in enumerate(views):
        view[:] = bytes([number]) * LARGE
    assert [bytes(view[:1]) + bytes(view[-1:]) for view in views] == [bytes([n, n]) for n in range(4)]


def test_no_more_is_kept_than_was_in_use_at_one_time_or_the_limit() -> None:
    pool = BufferPool(limit_bytes=2 * LARGE, peak_s=60.0)
    for size_bytes in (LARGE, 2 * LARGE, LARGE):
        views = [pool.allocate(size_bytes) for _ in range(5)]
        views.clear()
        gc.collect()
        assert 0 < pool.free_bytes <= 5 * _class_bytes(2 * LARGE)
        assert pool.used_bytes == 0


def test_what_a_peak_has_kept_is_given_back() -> None:
    pool = BufferPool(limit_bytes=2 * LARGE, peak_s=0.02)
    views = [pool.allocate(LARGE) for _ in range(5)]
    views.clear()
    gc.collect()
    deadline_s = time.monotonic() + 30
    while pool.free_bytes > 2 * LARGE and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert 0 < pool.free_bytes <= 2 * LARGE


@pytest.mark.parametrize("size_bytes", [0, 1, POOLED_BYTES_MIN - 1, POOLED_BYTES_MIN, (4 << 20) + 16])
def test_a_buffer_has_the_size_asked_for(size_bytes: int) -> None:
    view = BufferPool().allocate(size_bytes)
    assert (len(view), view.format, view.readonly) == (size_bytes, "B", False)


def test_a_size_class_wastes_at_most_an_eighth() -> None:
    for size_bytes in range(POOLED_BYTES_MIN, 64 << 20, 999_983):
        assert size_bytes <= _class_bytes(size_bytes) <= size_bytes * 9 // 8
